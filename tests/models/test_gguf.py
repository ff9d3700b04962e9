"""GGUF files written as llama.cpp's converter writes them are read back as the checkpoints that they were made of."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from models.errors import UnsupportedModelError, WeightsError
from models.loading.gguf import SUPPORTED_KINDS, GgufTensors, gguf_config, read_gguf
from models.registry import resolve_family

GOLDEN = Path(__file__).parent.parent / "golden" / "tiny"
CONVERTIBLE = {
    "llama": "llama",
    "llama3_rope": "llama",
    "llama_bias": "llama",
    "llama_linear_rope": "llama",
    "llama_yarn": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
STORED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Edit = Callable[[gguf.GGUFWriter], None]


def stored_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{STORED[inner]}.{kind}"
    return f"{STORED[module]}.{kind}"


def permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's converter."""
    split = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def llama3_factors(config: dict[str, Any], dim: int) -> np.ndarray:
    """`LlamaModel.generate_extra_tensors` of llama.cpp's converter."""
    rope, factors = config["rope_parameters"], []
    length = rope["original_max_position_embeddings"]
    for frequency in 1.0 / (rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float32) / dim)):
        wavelength = 2 * np.pi / frequency
        if wavelength < length / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > length / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            span = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (length / wavelength - rope["low_freq_factor"]) / span
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def write_rope(writer: gguf.GGUFWriter, config: dict[str, Any], head_dim: int) -> None:
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config, head_dim))
    elif rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def convert(name: str, path: Path, edit: Edit | None = None, kind: Kind = Kind.F32) -> dict[str, Any]:
    """Write the golden checkpoint `name` as a GGUF file; returns its config."""
    config = json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))
    architecture = CONVERTIBLE[name]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    write_rope(writer, config, head_dim)
    if name == "mistral" and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    writer.add_bos_token_id(config["bos_token_id"])
    ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    for tensor_name, values in load_file(GOLDEN / name / "model.safetensors").items():
        if architecture in ("llama", "smollm3") and ".q_proj." in tensor_name:
            values = permute(values, heads)
        if architecture in ("llama", "smollm3") and ".k_proj." in tensor_name:
            values = permute(values, kv_heads)
        if values.ndim == 2:
            packed = gguf.quants.quantize(values.astype(np.float32), kind)
            writer.add_tensor(stored_name(tensor_name), packed, raw_dtype=kind)
        else:
            writer.add_tensor(stored_name(tensor_name), values.astype(np.float32))
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_same_model_config_as_from_config_json(name: str, tmp_path: Path) -> None:
    config = convert(name, tmp_path / "m.gguf")
    read = gguf_config(read_gguf(tmp_path / "m.gguf"))
    family = resolve_family(config["architectures"])
    expected, found = family.translate(config, {}), resolve_family(read["architectures"]).translate(read, {})
    if name == "llama3_rope":  # the file holds the frequencies, not the parameters; these are checked on their own
        assert read["rope_parameters"] == pytest.approx({**config["rope_parameters"], "rope_type": "llama3"})
    assert found == expected


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_same_tensors_as_safetensors(name: str, tmp_path: Path) -> None:
    convert(name, tmp_path / "m.gguf")
    source = GgufTensors(read_gguf(tmp_path / "m.gguf"))
    expected = load_file(GOLDEN / name / "model.safetensors")
    assert set(source.names()) == set(expected)
    for tensor_name, values in expected.items():
        found = source.read(tensor_name)
        assert found.dtype == np.float32 and found.flags.c_contiguous
        assert source.shape(tensor_name) == found.shape == values.shape
        np.testing.assert_array_equal(found, values.astype(np.float32), err_msg=tensor_name)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize(
    ("low", "high", "length"), [(1.0, 4.0, 8192), (1.0, 4.0, 5000), (2.0, 8.0, 8192), (1.0, 3.0, 777)]
)
def test_llama3_scaling_is_recovered_from_its_factors(
    tmp_path: Path, factor: float, low: float, high: float, length: int
) -> None:
    """As frequencies: (2, 8, 8192) and (1, 4, 4096) are the same scaling."""
    rope = {"rope_theta": 500000.0, "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    rope["original_max_position_embeddings"] = length
    factors = llama3_factors({"rope_parameters": rope}, 128)
    convert("llama", tmp_path / "m.gguf", lambda writer: _head_128(writer, factors))
    found = gguf_config(read_gguf(tmp_path / "m.gguf"))["rope_parameters"]
    assert found["rope_type"] == "llama3"
    np.testing.assert_allclose(llama3_factors({"rope_parameters": found}, 128), factors, rtol=1e-5)


def _head_128(writer: gguf.GGUFWriter, factors: np.ndarray) -> None:
    pairs = writer.kv_data[0]
    for key, value in (("rope.dimension_count", 128), ("rope.freq_base", 500000.0), ("attention.key_length", 128)):
        pairs[f"llama.{key}"].value = value
    pairs["llama.attention.value_length"].value = 128
    writer.add_tensor("rope_freqs.weight", factors)


def test_foreign_frequency_factors_are_refused(tmp_path: Path) -> None:
    factors = np.linspace(1, 9, 8).astype(np.float32)
    convert("llama", tmp_path / "m.gguf", lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    with pytest.raises(UnsupportedModelError, match="not those of Llama 3"):
        gguf_config(read_gguf(tmp_path / "m.gguf"))


def test_yarn_factors(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_yarn_beta_fast(16.0)
        writer.add_rope_scaling_yarn_attn_factor(1.25)

    convert("llama_yarn", tmp_path / "m.gguf", edit)
    rope = gguf_config(read_gguf(tmp_path / "m.gguf"))["rope_parameters"]
    assert rope["beta_fast"] == 16.0 and rope["attention_factor"] == 1.25 and "beta_slow" not in rope
    convert("llama_yarn", tmp_path / "r.gguf", lambda writer: writer.add_rope_scaling_attn_factors(2.0))
    rope = gguf_config(read_gguf(tmp_path / "r.gguf"))["rope_parameters"]
    assert rope["attention_factor"] == pytest.approx(2.0 * (0.1 * np.log(4.0) + 1.0))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda w: w.add_expert_count(8), r"llama.expert_count = 8 is not supported"),
        (lambda w: w.add_logit_scale(2.0), r"llama.logit_scale = 2.0 is not supported"),
        (lambda w: w.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32)), r"'blk.0.attn_sinks.weight'"),
    ],
)
def test_what_would_change_the_result_is_refused(tmp_path: Path, edit: Edit, says: str) -> None:
    convert("llama", tmp_path / "m.gguf", edit)
    with pytest.raises(UnsupportedModelError, match=says):
        GgufTensors(read_gguf(tmp_path / "m.gguf"))


@pytest.mark.parametrize("kind", SUPPORTED_KINDS, ids=lambda kind: kind.name)
def test_every_supported_type_is_dequantized(tmp_path: Path, kind: Kind) -> None:
    """Bytes of all values in a matrix of [3, 512]; the package's own dequantization of the whole is the reference."""
    rng = np.random.default_rng(7)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 60, (3, 512 // block * block_bytes), dtype=np.uint8)  # small: no NaN in the scales
    convert("qwen2", tmp_path / "m.gguf", lambda writer: writer.add_tensor("output.weight", raw, raw_dtype=kind))
    source = GgufTensors(read_gguf(tmp_path / "m.gguf"))
    assert source.kind("lm_head.weight") == kind.name and source.shape("lm_head.weight") == (3, 512)
    found = source.read("lm_head.weight")
    assert found.shape == (3, 512) and len(np.unique(found)) > 10
    np.testing.assert_array_equal(found, gguf.quants.dequantize(raw, kind).reshape(3, 512))


def test_other_types_are_refused_by_name(tmp_path: Path) -> None:
    raw = np.zeros((3, 66), dtype=np.uint8)
    edit: Edit = lambda writer: writer.add_tensor("output.weight", raw, raw_dtype=Kind.IQ2_XXS)  # noqa: E731
    convert("qwen2", tmp_path / "m.gguf", edit)
    with pytest.raises(
        UnsupportedModelError, match=r"'output.weight' of m.gguf is stored as IQ2_XXS; supported: F32, F16"
    ):
        GgufTensors(read_gguf(tmp_path / "m.gguf"))


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.BF16, "bfloat16"), (Kind.F16, "float16"), (Kind.Q8_0, "float32")])
def test_dtype_is_that_of_the_matrices(tmp_path: Path, kind: Kind, dtype: str) -> None:
    convert("llama", tmp_path / "m.gguf", kind=kind)
    assert gguf_config(read_gguf(tmp_path / "m.gguf"))["dtype"] == dtype


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"architecture 'bert'; supported in GGUF files: llama, qwen2"):
        gguf_config(read_gguf(tmp_path / "m.gguf"))


def test_split_models_are_read_from_any_part(tmp_path: Path) -> None:
    convert("llama", tmp_path / "whole.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=20)
    whole = read_gguf(tmp_path / "whole.gguf")
    for key, value in whole.metadata.items():
        if key != "general.architecture":
            kind = gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32
            writer.add_key_value(key, value, kind)
    for tensor in whole.tensors.values():
        writer.add_tensor(tensor.name, tensor.values())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 1
    for part in parts:
        file = read_gguf(part)
        assert file.path == parts[0] and set(file.tensors) == set(whole.tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(GgufTensors(read_gguf(parts[1])).read(name), GgufTensors(whole).read(name))
    parts[1].unlink()
    with pytest.raises(WeightsError, match=rf"incomplete: {parts[1].name} missing"):
        read_gguf(parts[0])


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    convert("llama", path, lambda writer: writer.add_token_list(["a", "b", "c"]))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda data: b"", WeightsError, "it is empty"),
        (lambda data: b"PK" + data[2:], WeightsError, "does not begin with the bytes 'GGUF'"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], UnsupportedModelError, "is version 9; supported"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], UnsupportedModelError, "big-endian"),
        (lambda data: data[:200], WeightsError, "truncated: its header"),
        (lambda data: data[:-1000], WeightsError, "truncated: tensor '.*' ends at byte"),
    ],
)
def test_damaged_files(
    valid: bytes, tmp_path: Path, change: Callable[[bytes], bytes], error: type[Exception], says: str
) -> None:
    (tmp_path / "m.gguf").write_bytes(change(valid))
    with pytest.raises(error, match=says):
        read_gguf(tmp_path / "m.gguf")


def test_missing_file_and_missing_tensor(valid: bytes, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="none.gguf missing"):
        read_gguf(tmp_path / "none.gguf")
    (tmp_path / "m.gguf").write_bytes(valid)
    with pytest.raises(WeightsError, match=r"m.gguf has no tensor 'nothing'"):
        GgufTensors(read_gguf(tmp_path / "m.gguf")).read("nothing")


@given(position=st.integers(0, 3000), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damaged_byte_gives_one_of_our_errors_or_a_readable_file(
    valid: bytes, tmp_path: Path, position: int, value: int
) -> None:
    damaged = bytearray(valid)
    damaged[position] = value
    (tmp_path / "m.gguf").write_bytes(damaged)
    try:
        source = GgufTensors(read_gguf(tmp_path / "m.gguf"))
        for name in source.names():
            source.read(name)
    except (WeightsError, UnsupportedModelError) as error:
        assert "\n" not in str(error)
