"""Quantization while loading: bit for bit what numpy says, whatever the file format; and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGUFWriter

from engine.config import EngineConfig
from engine.convert import convert_model
from engine.errors import ConfigError
from models.errors import UnsupportedModelError, WeightsError
from models.loading.dummy import dummy_parameters
from models.loading.load import load_model
from models.loading.orbax import save_checkpoint
from models.loading.transfer import stream_to_device
from models.parameters import output_sizes, parameter_shapes
from models.quantization.format import packed_bytes
from models.quantization.schemes import MATRICES, SCHEMES, norm_of, storages_of
from pallas_kernels.quantized_matmul import QuantizedWeight, dequantize
from tests.models.tiny_checkpoints import expected_parameters, family_of, random_tensors, tiny_config, write_checkpoint

F32 = np.float32
# [K, N] of the matrices: 128x(96+32+32), 96x128, 128x(2*160), 160x128: groups of 128, 32, 128 and 32, blocks that end
# inside a projection.
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
KINDS_OF_SCHEMES = ("int8_w8a8", "fp8", "int4")  # one of each way through the code
BLOCKS = SIZES | {"intermediate_size": 256, "num_attention_heads": 8}  # whose inputs are all multiples of 128


def numpy_scheme(matrix: np.ndarray, name: str, norm: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Stored numbers [N, K] and scales [G, N] of one projection `[out, in]`, written again with plain loops."""
    wide, (n, k) = matrix.astype(F32), matrix.shape
    if name == "int8_w8a8":
        wide = turned(wide, next(size for size in (64, 32, 16) if k % size == 0))
    largest = {"int8": 127, "int8_w8a8": 127, "fp8": 448, "fp8_block": 448}.get(name, 7)
    group = {"fp8_block": 128, "int4_g32": 32, "int4_g64": 64, "int4_g128": 128}.get(name, k)
    if name == "int4":
        group = next(size for size in (128, 64, 32) if k % size == 0)
    rows = 128 if name == "fp8_block" else 1
    stored, scales = np.zeros((n, k), F32), np.zeros((k // group, n), F32)
    for first in range(0, n, rows):
        for g in range(k // group):
            part = (slice(first, first + rows), slice(g * group, (g + 1) * group))
            scale = np.abs(wide[part]).max() * F32(1 / largest)
            if name == "fp8":
                scale = least_error_scale(wide[part], scale, np.ones(k, F32) if norm is None else norm.astype(F32) ** 2)
            if name.startswith("int4"):
                scale = F32(scale.astype(ml_dtypes.bfloat16))
            numbers = wide[part] * (F32(1) / (scale if scale else F32(1)))
            if name.startswith("fp8"):
                numbers = np.clip(numbers, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(F32)
            else:
                numbers = np.clip(np.rint(numbers), -largest, largest)
            stored[part], scales[g, first : first + rows] = numbers, scale
    return stored, scales


def turned(matrix: np.ndarray, size: int) -> np.ndarray:
    """Blocks of inputs times a Hadamard matrix, by sums and differences."""
    blocks = matrix.reshape(len(matrix), -1, size).astype(np.float64)
    half = 1
    while half < size:
        pairs = blocks.reshape(*blocks.shape[:2], -1, 2, half)
        blocks = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2)
        blocks = blocks.reshape(len(matrix), -1, size)
        half *= 2
    return (blocks / np.sqrt(size)).reshape(matrix.shape).astype(F32)


def least_error_scale(row: np.ndarray, least: F32, importance: np.ndarray) -> F32:
    """Of 64 within an octave."""
    if least == 0:
        return least
    scales = (least * (2 ** (np.arange(64) / 64)).astype(F32))[:, None]
    numbers = (row * (F32(1) / scales)).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return scales[(importance * (numbers * scales - row) ** 2).sum(1).argmin(), 0]


def numbers_of(weight: QuantizedWeight) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(weight.stored.astype(jnp.float32)), np.asarray(weight.scales.astype(jnp.float32))


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal but for the last bits: of integers, at most one in a thousand that was on the edge between two."""
    return bool(np.abs(found - expected).max() <= 1 and np.mean(np.abs(found - expected) > 1e-6) < 1e-3)


def sizes_for(scheme: str) -> dict[str, Any]:
    return BLOCKS if scheme in ("fp8_block", "int4_g128", "int4_g64") else SIZES


@pytest.mark.parametrize(
    ("scheme", "dtype"), [*((name, "bfloat16") for name in SCHEMES), ("fp8", "float32"), ("int4", "float16")]
)
def test_bit_for_bit(scheme: str, dtype: str, tmp_path: Path) -> None:
    """The rounding is that of the checkpoint's own numbers; served in bfloat16, so that a detour would show."""
    raw = tiny_config(dtype=dtype, **sizes_for(scheme))
    tensors = random_tensors(raw)
    tensors["model.layers.0.self_attn.q_proj.weight"][3] = 0  # an output without weights
    model = load_model(write_checkpoint(tmp_path / "m", raw, tensors), dtype="bfloat16", quantization=scheme)
    assemblies = family_of(raw).assemblies(model.config)
    plain = expected_parameters(tensors, 2, tied=False)
    norms = {name: norm_of(name) for name in storages_of(model.config, scheme) if norm_of(name)}
    packed = 0
    for name, weight in model.params.items():
        if not isinstance(weight, QuantizedWeight):
            assert not name.endswith(MATRICES)
            assert np.array_equal(np.asarray(weight), plain[name].astype(ml_dtypes.bfloat16)), name
            continue
        packed += 1
        norm = tensors[assemblies[norms[name]].sources[0].name] if name in norms else None
        parts = [numpy_scheme(tensors[source.name], scheme, norm) for source in assemblies[name].sources]
        compare = np.array_equal if weight.rotation == 0 else close  # sums of turned numbers have an order
        stored, scales = numbers_of(weight)
        assert compare(scales, np.concatenate([s for _, s in parts], axis=1)), name
        assert compare(stored, np.concatenate([s for s, _ in parts], axis=0)), name
        assert weight.kind == {"fp8": "w8a16_fp8", "fp8_block": "w8a16_fp8"}.get(scheme, SCHEMES[scheme].kind)
    assert packed == 2 * len(MATRICES)


@pytest.mark.parametrize("scheme", KINDS_OF_SCHEMES)
def test_a_converted_checkpoint_gives_the_same(scheme: str, tmp_path: Path) -> None:
    raw = tiny_config(**sizes_for(scheme))
    path = write_checkpoint(tmp_path / "m", raw, random_tensors(raw))
    plain = load_model(path)
    save_checkpoint(plain.params, plain.config, tmp_path / "saved")
    require_equal(
        load_model(tmp_path / "saved", quantization=scheme).params, load_model(path, quantization=scheme).params
    )


def require_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, weight in left.items():
        assert type(weight) is type(right[name]), name
        if isinstance(weight, QuantizedWeight):
            assert all(
                np.array_equal(a, b) for a, b in zip(numbers_of(weight), numbers_of(right[name]), strict=True)
            ), name
        else:
            assert np.array_equal(np.asarray(weight), np.asarray(right[name])), name


def test_gguf_gives_the_same(tmp_path: Path) -> None:
    """Q, k and v come out of a GGUF file as they come out of safetensors; qwen2 permutes nothing on the way."""
    raw = tiny_config("Qwen2ForCausalLM", **SIZES | {"head_dim": None, "num_attention_heads": 8})
    tensors = random_tensors(raw)
    path = write_checkpoint(tmp_path / "m", raw, tensors)
    expected = load_model(path, quantization="int4")
    config = expected.config
    writer = GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope.theta)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in tensors.items():
        renamed = name.replace("model.layers.", "blk.")
        for theirs, ours in names.items():
            renamed = renamed.replace(f"{theirs}.", f"{ours}.")
        writer.add_tensor(renamed, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    require_equal(load_model(tmp_path / "m.gguf", quantization="int4").params, expected.params)


@pytest.mark.parametrize("scheme", KINDS_OF_SCHEMES)
def test_dummy_weights_are_of_the_same_kind(scheme: str, tmp_path: Path) -> None:
    raw = tiny_config(**sizes_for(scheme))
    path = write_checkpoint(tmp_path / "m", raw, random_tensors(raw))
    real = load_model(path, quantization=scheme)
    made = load_model(path, "dummy", quantization=scheme, seed=3)
    again = load_model(path, "dummy", quantization=scheme, seed=3)
    require_equal(made.params, again.params)
    dense = dummy_parameters(real.config, np.dtype(F32), 3)
    for name, weight in real.params.items():
        assert describe(made.params[name]) == describe(weight), name
    for name in storages_of(real.config, scheme):
        values, plain = np.asarray(dequantize(made.params[name])), np.asarray(dense[name])
        assert values.std() == pytest.approx(plain.std(), rel=0.15), name
        assert len(np.unique(np.asarray(made.params[name].stored.astype(jnp.float32)))) > 14


def describe(weight: Any) -> Any:
    """Everything about a weight but its numbers."""
    if isinstance(weight, QuantizedWeight):
        return (
            weight.kind,
            weight.group_size,
            weight.rotation,
            *(f"{a.shape} {a.dtype}" for a in (weight.stored, weight.scales)),
        )
    return weight.shape, weight.dtype


def test_sizes_are_those_on_the_device(tmp_path: Path) -> None:
    """`packed_bytes` is what JAX says; 4 bits are 4 bits. Progress counts the checkpoint's bytes of packed ones."""
    raw = tiny_config(**SIZES)
    path = write_checkpoint(tmp_path / "m", raw, random_tensors(raw))
    reported: list[tuple[int, int, str]] = []
    model = load_model(path, quantization="int4", progress=lambda *r: reported.append(r))
    shapes = parameter_shapes(model.config)
    for name, storage in storages_of(model.config, "int4").items():
        weight = model.params[name]
        assert isinstance(weight, QuantizedWeight)
        size = weight.stored.on_device_size_in_bytes() + weight.scales.on_device_size_in_bytes()
        assert size == packed_bytes(shapes[name], storage) == weight.size_bytes
    total = sum(4 * math.prod(shape) for shape in shapes.values())
    assert reported[-1][:2] == (total, total)


def test_one_projection_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No host buffer is made for a packed parameter: only embedding, head and norms go through one."""
    raw = tiny_config(**SIZES)
    path = write_checkpoint(tmp_path / "m", raw, random_tensors(raw))
    filled: list[str] = []

    def watched(shapes: Any, dtype: Any, fill: Any, *rest: Any) -> Any:
        return stream_to_device(shapes, dtype, lambda name, host: (filled.append(name), fill(name, host)), *rest)

    monkeypatch.setattr("models.loading.assemble.stream_to_device", watched)
    model = load_model(path, quantization="int8")
    assert sorted(filled) == sorted(name for name in model.params if not name.endswith(MATRICES))


def test_projections_lie_side_by_side() -> None:
    raw = tiny_config(**SIZES)
    config = family_of(raw).translate(raw, {})
    for name, assembly in family_of(raw).assemblies(config).items():
        if name.endswith(MATRICES):
            assert output_sizes(config, name) == tuple(source.shape[0] for source in assembly.sources)


class TestRefused:
    def test_groups_that_do_not_divide(self, tmp_path: Path) -> None:
        raw = tiny_config(**SIZES)
        path = write_checkpoint(tmp_path / "m", raw, random_tensors(raw))
        for load_format in ("safetensors", "dummy"):
            with pytest.raises(UnsupportedModelError) as caught:
                load_model(path, load_format, quantization="int4_g64")
            message = str(caught.value)
            assert "int4_g64" in message and "groups of 64" in message and "layers.0.attn.o.weight has 96" in message
            assert "int8, int8_w8a8, fp8, int4, int4_g32." in message

    def test_no_group_size_divides(self, tmp_path: Path) -> None:
        raw = tiny_config()
        path = write_checkpoint(tmp_path / "m", raw, random_tensors(raw))
        with pytest.raises(UnsupportedModelError, match="groups of 128 or 64 or 32.*int8, int8_w8a8, fp8\\."):
            load_model(path, quantization="int4")

    def test_an_unknown_scheme(self, tmp_path: Path) -> None:
        raw = tiny_config()
        path = write_checkpoint(tmp_path / "m", raw, random_tensors(raw))
        with pytest.raises(UnsupportedModelError, match="'int2' is not known; known are int8"):
            load_model(path, quantization="int2")
        with pytest.raises(ConfigError, match="quantization must be one of int8, .*; got 'int2'"):
            EngineConfig.from_flat(quantization="int2")

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_numbers_that_are_not_finite(self, value: float, tmp_path: Path) -> None:
        raw = tiny_config(**SIZES)
        tensors = random_tensors(raw)
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value
        path = write_checkpoint(tmp_path / "m", raw, tensors)
        plain = load_model(path)
        save_checkpoint(plain.params, plain.config, tmp_path / "saved")
        with pytest.raises(WeightsError, match="model.layers.1.mlp.up_proj.weight: .* not finite"):
            load_model(path, quantization="int8")
        with pytest.raises(WeightsError, match="layers.1.mlp.gate_up.weight: .* not finite"):
            load_model(tmp_path / "saved", quantization="int8")

    def test_tensors_that_do_not_fit(self, tmp_path: Path) -> None:
        raw = tiny_config(**SIZES)
        tensors = random_tensors(raw)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        with pytest.raises(WeightsError, match="up_proj.weight is missing"):
            load_model(write_checkpoint(tmp_path / "m", raw, tensors), quantization="int8")

    def test_converting(self, tmp_path: Path) -> None:
        config = EngineConfig.from_flat(model=str(tmp_path), quantization="int8")
        with pytest.raises(ConfigError, match="full-precision weights: quantization='int8'"):
            convert_model(config, tmp_path / "out", lambda done, total, what: None)
        assert not (tmp_path / "out").exists()

    def test_saving_packed_weights(self, tmp_path: Path) -> None:
        raw = tiny_config(**SIZES)
        model = load_model(write_checkpoint(tmp_path / "m", raw, random_tensors(raw)), quantization="int8")
        with pytest.raises(WeightsError, match="attn.qkv.weight: expected .* found none"):
            save_checkpoint(model.params, model.config, tmp_path / "saved")
