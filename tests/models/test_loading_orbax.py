"""Quire checkpoints: what is saved comes back, by Quire's reader and by Orbax; damage is named."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from models.config import ModelConfig
from models.errors import ModelNotFoundError, UnsupportedModelError, WeightsError
from models.loading import orbax as quire_orbax
from models.loading.load import LoadedModel, load_model, read_config
from models.loading.orbax import COPIED_FILES, load_checkpoint, save_checkpoint
from models.parameters import parameter_shapes
from tests.models.tiny_checkpoints import GOLDEN, random_tensors, tiny_config, write_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(dtype="bfloat16", sliding_window=8, architectures=["MistralForCausalLM"])
    directory = write_checkpoint(tmp_path_factory.mktemp("original"), config, random_tensors(config))
    (directory / "tokenizer.json").write_text('{"a": 1}')
    (directory / "notes.txt").write_text("not copied")
    return directory


@pytest.fixture(scope="module")
def loaded(original: Path) -> LoadedModel:
    return load_model(original)


@pytest.fixture
def saved(loaded: LoadedModel, original: Path, tmp_path: Path) -> Path:
    save_checkpoint(loaded.params, loaded.config, tmp_path / "saved", original)
    return tmp_path / "saved"


def assert_same(found: dict[str, jax.Array], expected: dict[str, jax.Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name


def test_round_trip(saved: Path, loaded: LoadedModel) -> None:
    again = load_model(saved)
    assert again.config == loaded.config
    assert_same(again.params, loaded.params)
    assert read_config(saved) == loaded.config


def test_files(saved: Path, original: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert names == {"quire.json", "weights", "config.json", "tokenizer.json"}
    assert "tokenizer.json" in COPIED_FILES
    assert (saved / "tokenizer.json").read_text() == (original / "tokenizer.json").read_text()
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]  # nothing partial is left
    assert (saved.stat().st_mode & 0o777) == 0o755


def test_orbax_reads_it_too(saved: Path, loaded: LoadedModel) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(saved / "weights")
    assert_same({name: jax.numpy.asarray(array) for name, array in restored.items()}, loaded.params)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype(saved: Path, loaded: LoadedModel, dtype: str) -> None:
    _, params = load_checkpoint(saved, dtype)
    assert_same(params, {name: array.astype(dtype) for name, array in loaded.params.items()})
    with pytest.raises(UnsupportedModelError, match="dtype 'int8' is not supported"):
        load_checkpoint(saved, "int8")


def test_progress(saved: Path, loaded: LoadedModel) -> None:
    calls: list[tuple[int, int, str]] = []
    load_model(saved, progress=lambda *call: calls.append(call))
    assert [name for *_, name in calls] == list(parameter_shapes(loaded.config))
    assert calls[-1][0] == calls[-1][1] == sum(array.nbytes for array in loaded.params.values())


OTHER_LAYOUTS = [
    {"use_ocdbt": True, "use_zarr3": False},
    {"use_ocdbt": True, "use_zarr3": True},
    {"use_ocdbt": False, "use_zarr3": True},
    {"use_ocdbt": False, "use_zarr3": False, "use_compression": True},
]


@pytest.mark.parametrize("layout", OTHER_LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_other_layouts_are_restored_by_orbax(saved: Path, loaded: LoadedModel, layout: dict, dtype: str) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**layout)) as checkpointer:
        checkpointer.save(saved / "weights", args=ocp.args.PyTreeSave(loaded.params), force=True)
    config, params = load_checkpoint(saved, dtype)
    assert config == loaded.config
    target = "bfloat16" if dtype == "auto" else dtype
    assert_same(params, {name: array.astype(target) for name, array in loaded.params.items()})


def test_several_chunks_are_restored_by_orbax(saved: Path, loaded: LoadedModel) -> None:
    chunked = {name: ocp.SaveArgs(chunk_byte_size=64) for name in loaded.params}  # as arrays sharded over devices are
    with ocp.Checkpointer(quire_orbax._handler()) as checkpointer:
        args = ocp.args.PyTreeSave(loaded.params, save_args=chunked)
        checkpointer.save(saved / "weights", args=args, force=True)
    assert len(list((saved / "weights" / "embed.weight").iterdir())) > 2
    assert_same(load_checkpoint(saved)[1], loaded.params)


def test_the_fast_way_is_taken(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("Orbax was asked to restore")

    monkeypatch.setattr(quire_orbax, "_restore_with_orbax", fail)
    assert load_checkpoint(saved)


def test_large_arrays_are_read_in_pieces(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=70001, num_hidden_layers=1)  # 3.4 MB, no multiple of a page
    model = load_model(write_checkpoint(tmp_path / "model", config, random_tensors(config)))
    save_checkpoint(model.params, model.config, tmp_path / "saved")
    assert_same(load_checkpoint(tmp_path / "saved")[1], model.params)


def test_short_reads_are_continued(saved: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: whole(file, [buffers[0][:7]], offset))
    assert_same(load_checkpoint(saved)[1], loaded.params)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(WeightsError, match="became shorter while it was read"):
        load_checkpoint(saved)


def test_golden_round_trip(tmp_path: Path) -> None:
    model = load_model(GOLDEN / "llama_yarn_mscale")
    save_checkpoint(model.params, model.config, tmp_path / "saved", GOLDEN / "llama_yarn_mscale")
    assert load_model(tmp_path / "saved").config == model.config  # every field of RopeConfig survives


def test_truncated_array(saved: Path) -> None:
    chunk = saved / "weights" / "layers.1.attn.qkv.weight" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-2])
    with pytest.raises(WeightsError, match=r"layers\.1\.attn\.qkv\.weight/0\.0 is truncated"):
        load_checkpoint(saved)


def test_missing_chunk(saved: Path) -> None:
    (saved / "weights" / "norm.weight" / "0").unlink()
    with pytest.raises(WeightsError, match=r"norm\.weight/0 cannot be read"):
        load_checkpoint(saved)


def test_missing_array(saved: Path) -> None:
    for file in (saved / "weights" / "norm.weight").iterdir():
        file.unlink()
    with pytest.raises(WeightsError, match=r"1 parameters are not .*: norm\.weight: expected \[12\], found none"):
        load_checkpoint(saved)


def test_misshapen_array(saved: Path) -> None:
    file = saved / "weights" / "norm.weight" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [13]}))
    with pytest.raises(WeightsError, match=r"norm\.weight: expected \[12\], found \[13\]"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"{", "quire.json is corrupted"),
        (lambda content: b"[]", "quire.json is corrupted"),
        (lambda content: content | {"version": 2}, "version 2; this Quire reads quire-checkpoint version 1"),
        (lambda content: content | {"config": {"family": "llama"}}, "ModelConfig differs in"),
        (lambda content: content | {"config": content["config"] | {"flavour": 1}}, "ModelConfig differs in flavour"),
    ],
)
def test_damaged_manifest(saved: Path, change, message: str) -> None:
    file = saved / "quire.json"
    changed = change(json.loads(file.read_text()))
    file.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    with pytest.raises(WeightsError, match=message):
        load_checkpoint(saved)


def test_not_a_checkpoint(original: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"not a Quire checkpoint: it has no quire\.json"):
        load_model(original, "orbax")


def test_nothing_is_overwritten(saved: Path, loaded: LoadedModel) -> None:
    with pytest.raises(WeightsError, match="exists already"):
        save_checkpoint(loaded.params, loaded.config, saved)


def test_a_failed_save_leaves_nothing(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quire_orbax, "write_manifest", full)
    with pytest.raises(WeightsError, match="No space left"):
        save_checkpoint(loaded.params, loaded.config, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_only_the_decoders_parameters_are_saved(loaded: LoadedModel, tmp_path: Path) -> None:
    config: ModelConfig = loaded.config
    missing = {name: array for name, array in loaded.params.items() if name != "norm.weight"}
    with pytest.raises(WeightsError, match=r"norm\.weight: expected \[12\], found none"):
        save_checkpoint(missing, config, tmp_path / "saved")
    mixed = loaded.params | {"norm.weight": loaded.params["norm.weight"].astype("float32")}
    with pytest.raises(WeightsError, match="must share one dtype.*found bfloat16, float32"):
        save_checkpoint(mixed, config, tmp_path / "saved")
