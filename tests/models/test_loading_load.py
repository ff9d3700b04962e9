"""`load_model`: formats, dtypes, the golden checkpoints, dummy weights, and what goes wrong before any weight is
read."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from safetensors.numpy import load_file

from models.errors import ModelNotFoundError, UnsupportedModelError, WeightsError
from models.loading.load import FORMATS, choose_format, load_model, read_config
from models.parameters import parameter_shapes
from tests.models.tiny_checkpoints import (
    GOLDEN,
    GOLDEN_NAMES,
    expected_parameters,
    random_tensors,
    tiny_config,
    write_checkpoint,
    write_shards,
)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_checkpoints(name: str) -> None:
    tensors: dict[str, np.ndarray] = {}
    for file in (GOLDEN / name).glob("*.safetensors"):
        tensors |= load_file(file)
    model = load_model(GOLDEN / name)
    config = model.config
    expected = expected_parameters(tensors, config.num_layers, tied=config.tie_word_embeddings)
    assert {name: array.shape for name, array in model.params.items()} == parameter_shapes(config)
    assert model.params.keys() == expected.keys()
    for parameter, array in model.params.items():
        assert np.array_equal(np.asarray(array), expected[parameter]), parameter


def test_shards_hold_the_same_weights() -> None:
    single, sharded = load_model(GOLDEN / "llama"), load_model(GOLDEN / "llama_sharded")
    assert single.config == sharded.config
    assert all(np.array_equal(single.params[name], sharded.params[name]) for name in single.params)


def test_gguf_goes_the_same_way(tmp_path: Path) -> None:
    single = load_model(GOLDEN / "qwen2")
    config = single.config
    writer = GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = get_tensor_name_map(MODEL_ARCH.QWEN2, config.num_layers)
    for name, tensor in load_file(GOLDEN / "qwen2" / "model.safetensors").items():
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    for path in (tmp_path, tmp_path / "model.gguf"):
        model = load_model(path)
        assert model.config == config
        assert model.params.keys() == single.params.keys()
        assert all(np.array_equal(model.params[name], array) for name, array in single.params.items())


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(dtype="bfloat16")
    return write_checkpoint(tmp_path_factory.mktemp("model"), config, random_tensors(config))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")],
)
@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_dtypes(model_directory: Path, load_format: str, dtype: str, expected: str) -> None:
    model = load_model(model_directory, load_format, dtype)
    assert {str(array.dtype) for array in model.params.values()} == {expected}
    assert model.config.dtype == "bfloat16"  # of the checkpoint, not of the parameters
    assert all(isinstance(array, jax.Array) for array in model.params.values())


def test_sharded_checkpoint(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    model = load_model(write_shards(tmp_path / "model", config, tensors, count=3))
    expected = expected_parameters(tensors, 2, tied=False)
    assert all(np.array_equal(model.params[name], expected[name]) for name in expected)


def test_eos_from_the_generation_config(tmp_path: Path) -> None:
    config = tiny_config(eos_token_id=2)
    directory = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    assert read_config(directory).eos_token_ids == (2,)
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert read_config(directory).eos_token_ids == (3, 4)
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="generation_config.json is not valid JSON"):
        read_config(directory)


def test_formats_are_found(model_directory: Path, tmp_path: Path) -> None:
    assert choose_format(model_directory, "auto") == "safetensors"
    (tmp_path / "model.gguf").write_bytes(b"")
    assert choose_format(tmp_path, "auto") == "gguf"
    assert choose_format(tmp_path / "model.gguf", "auto") == "gguf"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert choose_format(tmp_path, "auto") == "safetensors"
    (tmp_path / "quire.json").write_text("{}")
    assert choose_format(tmp_path, "auto") == "orbax"
    assert all(choose_format(tmp_path, name) == name for name in FORMATS)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(ModelNotFoundError, match=r"has no \*\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"has no \*\.gguf"):
        load_model(tmp_path, "gguf")
    with pytest.raises(ModelNotFoundError, match="is not a directory"):
        load_model(tmp_path / "config.json", "safetensors")


def test_several_gguf_files(tmp_path: Path) -> None:
    for name in ("q4.gguf", "q8.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"2 GGUF files; name one of them: q4\.gguf, q8\.gguf"):
        load_model(tmp_path)


def test_unknown_words(model_directory: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="load_format 'pt' is not known; known are auto, safetensors"):
        load_model(model_directory, "pt")
    for load_format in ("safetensors", "dummy"):
        with pytest.raises(UnsupportedModelError, match="dtype 'int8' is not supported; supported are auto, float32"):
            load_model(model_directory, load_format, "int8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1,}', r"config\.json is not valid JSON: .*line 1"),
        ("[1]", "must hold a JSON object, not a list"),
        ("{}", "no architecture is named; supported are LlamaForCausalLM"),
        ('{"architectures": "LlamaForCausalLM"}', "architectures is 'LlamaForCausalLM'; it must be a list"),
        ('{"architectures": ["BertModel"]}', "BertModel is not supported; supported are LlamaForCausalLM"),
    ],
)
def test_damaged_config(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xff")
    with pytest.raises(UnsupportedModelError, match="not valid JSON"):
        load_model(tmp_path)


def test_weights_that_do_not_fit_the_config(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", tiny_config(hidden_size=14), random_tensors(tiny_config()))
    with pytest.raises(WeightsError, match=r"misshapen.*embed_tokens\.weight is \[40, 12\], expected \[40, 14\]"):
        load_model(directory)


def test_dummy_weights_need_a_config_only(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=256, vocab_size=512, intermediate_size=512, attention_bias=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    calls: list[tuple[int, int, str]] = []
    model = load_model(tmp_path, "dummy", seed=3, progress=lambda *call: calls.append(call))
    assert {name: array.shape for name, array in model.params.items()} == parameter_shapes(model.config)
    assert calls[-1][0] == calls[-1][1] == sum(array.nbytes for array in model.params.values())

    again, other = load_model(tmp_path, "dummy", seed=3), load_model(tmp_path, "dummy", seed=4)
    name = "layers.0.attn.qkv.weight"
    assert np.array_equal(model.params[name], again.params[name])
    assert not np.array_equal(model.params[name], other.params[name])
    assert not np.array_equal(model.params[name], model.params["layers.1.attn.qkv.weight"])


def test_dummy_weights_have_a_sensible_scale(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=256, vocab_size=512, intermediate_size=512)
    (tmp_path / "config.json").write_text(json.dumps(config))
    params = {name: np.asarray(array) for name, array in load_model(tmp_path, "dummy").params.items()}
    assert (params["norm.weight"] == 1).all()
    assert (params["layers.1.mlp_norm.weight"] == 1).all()
    assert params["embed.weight"].std() == pytest.approx(256**-0.5, rel=0.02)
    assert params["layers.0.attn.qkv.weight"].std() == pytest.approx(256**-0.5, rel=0.05)
    assert params["layers.0.mlp.down.weight"].std() == pytest.approx((512 * 2 * 2) ** -0.5, rel=0.05)
    rounded = load_model(tmp_path, "dummy", "bfloat16").params["embed.weight"]
    assert np.array_equal(np.asarray(rounded), params["embed.weight"].astype(rounded.dtype))
