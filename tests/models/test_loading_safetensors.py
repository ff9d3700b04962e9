"""Reading safetensors: the package's own writer is the second opinion, and damaged files must fail by name."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from models.errors import ModelNotFoundError, WeightsError
from models.loading.safetensors import has_safetensors, open_safetensors, read_header

DTYPES = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)),
        max_size=5,
    ),
    st.integers(0, 2**32 - 1),
)
def test_reads_what_the_package_writes(tmp_path_factory, layout: dict, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in layout.items()}
    directory = tmp_path_factory.mktemp("written")
    (directory / "model.safetensors").write_bytes(save(tensors, metadata={"format": "np"}))
    if not tensors:
        assert not open_safetensors(directory).names()
        return
    source = open_safetensors(directory)
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        found = source.read(name)
        assert source.shape(name) == found.shape == tensor.shape
        assert found.dtype == tensor.dtype
        assert found.tobytes() == tensor.tobytes()


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}, tmp_path / "model.safetensors"
    )
    return tmp_path / "model.safetensors"


def test_views_are_read_only(single: Path) -> None:
    view = open_safetensors(single.parent).read("a")
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 5.0


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -1, -16])
def test_truncated(single: Path, keep: int) -> None:
    single.write_bytes(single.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"model\.safetensors is truncated"):
        open_safetensors(single.parent)


def rewrite_header(file: Path, change) -> None:
    """Replace the header by `change(header)`, which gives a JSON value or bytes; the data stay."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = change(json.loads(raw[8 : 8 + size]))
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + size :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: b"{not json", "header is not JSON"),
        (lambda h: b"\xff\xfe{}", "header is not JSON"),
        (lambda h: [1], "header is not a JSON object"),
        (lambda h: h | {"a": 3}, "entry for a is not readable"),
        (lambda h: h | {"a": {"dtype": "F32", "shape": [2, 3]}}, "entry for a is not readable"),
        (lambda h: h | {"a": h["a"] | {"shape": [-2, -3]}}, "entry for a has impossible values"),
        (lambda h: h | {"a": h["a"] | {"shape": [2.0, 3]}}, "entry for a has impossible values"),
        (lambda h: h | {"a": h["a"] | {"dtype": "Q4"}}, "a has the unknown dtype 'Q4'; known are F64"),
        (lambda h: h | {"a": h["a"] | {"dtype": ["F32"]}}, "entry for a has impossible values"),
        (lambda h: h | {"a": h["a"] | {"shape": [2, 4]}}, r"a of shape \[2, 4\] and dtype F32 needs 32 bytes.*24"),
        (lambda h: {"a": h["a"]}, "16 bytes follow the last tensor"),
        (lambda h: {"b": h["b"]}, "b starts at byte"),
        (lambda h: h | {"c": h["a"]}, "starts at byte"),
    ],
)
def test_corrupted(single: Path, change, message: str) -> None:
    rewrite_header(single, change)
    with pytest.raises(WeightsError, match=message) as caught:
        open_safetensors(single.parent)
    assert str(single) in str(caught.value)


def test_absurd_header_size(single: Path) -> None:
    single.write_bytes((2**63).to_bytes(8, "little") + single.read_bytes()[8:])
    with pytest.raises(WeightsError, match="truncated or not a safetensors file"):
        read_header(single)


def test_tensors_of_every_dtype(tmp_path: Path) -> None:
    save_file({"q": np.ones((2, 2), np.int8), "f": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    assert source.shape("q") == (2, 2)
    assert (source.dtype("q"), source.read("q").dtype) == ("int8", np.int8)
    assert (source.dtype("f"), source.read("f").dtype) == ("float32", np.float32)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": np.ones(3, np.float32)}, tmp_path / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_sharded(sharded: Path) -> None:
    source = open_safetensors(sharded)
    assert sorted(source.names()) == ["a", "b"]
    assert source.read("b").tolist() == [1, 1, 1]


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    save_file({"a": np.zeros(2, np.float32)}, sharded / "consolidated.safetensors")  # Mistral's second copy
    assert sorted(open_safetensors(sharded).names()) == ["a", "b"]


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="names 2 files, of which 1 are missing: model-00002-of-00002.safetensors"):
        open_safetensors(sharded)


def test_truncated_shard_is_named(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="model-00002-of-00002.safetensors is truncated"):
        open_safetensors(sharded)


def test_index_that_names_the_wrong_file(sharded: Path) -> None:
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="1 tensors are not in the file that the index names: a"):
        open_safetensors(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}'])
def test_damaged_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match="not an index of safetensors files"):
        open_safetensors(sharded)


def test_the_same_tensor_twice(sharded: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, sharded / "model-00002-of-00002.safetensors")
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match="a is in both"):
        open_safetensors(sharded)


def test_no_files(tmp_path: Path) -> None:
    assert not has_safetensors(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"has no \*\.safetensors file\.$"):
        open_safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"\*\.bin cannot be read: convert them to safetensors"):
        open_safetensors(tmp_path)


def test_agrees_with_the_package_on_the_single_file(single: Path) -> None:
    theirs, ours = load_file(single), open_safetensors(single.parent)
    assert all(np.array_equal(ours.read(name), tensor) for name, tensor in theirs.items())
