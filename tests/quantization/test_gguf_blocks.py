"""GGUF blocks that stay packed: bit for bit what the `gguf` package dequantizes them to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from models.errors import UnsupportedModelError, WeightsError
from models.layers.product import MixedWeight
from models.loading.load import load_model
from models.quantization.gguf import KINDS
from pallas_kernels.quantized_matmul import QuantizedWeight
from tests.models.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.quantization.packing import SIZES, dense, require_values

HIDDEN, FFN, HEADS, KV_HEADS, DIM, VOCAB = 64, 96, 4, 2, 16, 40
MATRICES = {  # stored name -> Hugging Face's, (N, K)
    "attn_q": ("self_attn.q_proj", (HEADS * DIM, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * DIM, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * DIM, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * DIM)),
    "ffn_gate": ("mlp.gate_proj", (FFN, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (FFN, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, FFN)),
}


def random_blocks(kind: Kind, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """uint8[N, bytes of a row]: any numbers, scales and minima of either sign."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = shape[0] * shape[1] // block
    blocks = rng.integers(0, 256, (count, size)).astype(np.uint8)
    for start in (0, 2) if kind is Kind.Q4_1 else (0,):
        scales = (rng.uniform(0.5, 1.5, (count, 1)) * rng.choice([-1, 1], (count, 1))).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_gguf(
    path: Path, kinds: dict[str, Kind], default: Kind, architecture: str = "llama", damaged: str = ""
) -> dict[str, np.ndarray]:
    """Write a model whose matrices are random blocks; returns the values of its tensors under Hugging Face's names.

    Args:
        kinds: stored name -> kind of blocks; others are of the kind `default`.
        damaged: stored name of a matrix of layer 0 whose first scale is infinite.
    """
    rng, values = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(DIM)
    writer.add_value_length(DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(DIM)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def plain(stored: str, name: str, shape: tuple[int, ...]) -> None:
        values[name] = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(stored, values[name])

    def matrix(stored: str, name: str, shape: tuple[int, int]) -> None:
        part = stored.split(".")[-2]
        kind = kinds.get(part, default)
        if kind in (Kind.F32, Kind.F16):
            packed = rng.standard_normal(shape).astype(np.float32 if kind is Kind.F32 else np.float16)
            values[name] = packed.astype(np.float32)
        else:
            packed = random_blocks(kind, shape, rng)
            if damaged and stored == f"blk.0.{damaged}.weight":
                packed[0, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
            with np.errstate(invalid="ignore"):  # of the damaged one
                values[name] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(stored, packed, raw_dtype=kind)
        if architecture == "llama" and part in ("attn_q", "attn_k"):
            # llama.cpp's converter stored rows (0, D/2, 1, D/2 + 1, ...) of each head; undone row by row.
            rows = [
                head * DIM + (d % (DIM // 2)) * 2 + d // (DIM // 2)
                for head in range(shape[0] // DIM)
                for d in range(DIM)
            ]
            values[name] = values[name][rows]

    matrix("token_embd.weight", "model.embed_tokens.weight", (VOCAB, HIDDEN))
    plain("output_norm.weight", "model.norm.weight", (HIDDEN,))
    matrix("output.weight", "lm_head.weight", (VOCAB, HIDDEN))
    for layer in range(2):
        plain(f"blk.{layer}.attn_norm.weight", f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,))
        plain(f"blk.{layer}.ffn_norm.weight", f"model.layers.{layer}.post_attention_layernorm.weight", (HIDDEN,))
        if architecture == "qwen3":
            for norm in ("q_norm", "k_norm"):
                plain(f"blk.{layer}.attn_{norm}.weight", f"model.layers.{layer}.self_attn.{norm}.weight", (DIM,))
        for stored, (name, shape) in MATRICES.items():
            matrix(f"blk.{layer}.{stored}.weight", f"model.layers.{layer}.{name}.weight", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_bit_for_bit(kind: Kind, architecture: str, tmp_path: Path) -> None:
    """All matrices of the layers and the head are packed; llama's rows of q and k are put back in order."""
    values = write_gguf(tmp_path / "m.gguf", {}, kind, architecture)
    loaded = load_model(tmp_path / "m.gguf", dtype="float32", quantization="gguf")
    require_values(loaded.params, values)
    packed = {name for name, weight in loaded.params.items() if isinstance(weight, QuantizedWeight)}
    assert len(packed) == 2 * 4 + 1 and "head.weight" in packed and "embed.weight" not in packed
    weight = loaded.params["layers.0.attn.qkv.weight"]
    assert isinstance(weight, QuantizedWeight)
    assert (weight.bits, weight.group_size, str(weight.scales.dtype)) == (KINDS[kind.name].bits, 32, "float16")
    assert (weight.offsets is not None) == (kind is Kind.Q4_1)
    kept = "w8a16" if kind is Kind.Q8_0 else "w4a16"
    assert loaded.quantization == f"gguf ({kept}, group 32: qkv, o, gate_up, down, head)"


def test_the_same_values_as_dequantized(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {}, Kind.Q4_1)
    plain = load_model(tmp_path / "m.gguf", dtype="float32")
    kept = load_model(tmp_path / "m.gguf", dtype="float32", quantization="gguf")
    assert plain.quantization is None
    for name, weight in kept.params.items():
        found = dense(weight)
        found = found.T if name == "head.weight" else found
        np.testing.assert_array_equal(found, np.asarray(plain.params[name]), err_msg=name)


def test_kinds_beside_each_other(tmp_path: Path) -> None:
    """Fused matrices of different kinds stay apart; kinds that no kernel has are dequantized."""
    kinds = {"attn_v": Kind.Q8_0, "ffn_gate": Kind.Q4_1, "ffn_up": Kind.F16, "ffn_down": Kind.Q5_0, "output": Kind.Q5_1}
    values = write_gguf(tmp_path / "m.gguf", kinds, Kind.Q4_0)
    params = load_model(tmp_path / "m.gguf", dtype="float32", quantization="gguf").params
    require_values(params, values)
    qkv, gate_up = params["layers.1.attn.qkv.weight"], params["layers.1.mlp.gate_up.weight"]
    assert isinstance(qkv, MixedWeight) and isinstance(gate_up, MixedWeight)
    assert bits_of(qkv.parts) == [4, 4, 8]
    assert bits_of(gate_up.parts) == [4, None]
    assert not isinstance(params["layers.1.mlp.down.weight"], QuantizedWeight)
    assert not isinstance(params["head.weight"], QuantizedWeight)


def bits_of(parts: Sequence[object]) -> list[int | None]:
    return [part.bits if isinstance(part, QuantizedWeight) else None for part in parts]


def test_a_file_without_such_blocks(tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "m.gguf", {}, Kind.F16)
    loaded = load_model(tmp_path / "m.gguf", dtype="float32", quantization="gguf")
    require_values(loaded.params, values)
    assert loaded.quantization == "gguf (dequantized)"


def test_rounding_still_works(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {}, Kind.Q4_1)
    loaded = load_model(tmp_path / "m.gguf", quantization="int8")
    assert loaded.quantization is not None and loaded.quantization.startswith("int8 (w8a16")


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {}, Kind.Q4_0, damaged="ffn_down")
    with pytest.raises(WeightsError, match="mlp.down_proj.weight: its blocks hold scales that are not finite"):
        load_model(tmp_path / "m.gguf", dtype="float32", quantization="gguf")


def test_refused_for_other_files(tmp_path: Path) -> None:
    raw = tiny_config(**SIZES)
    write_checkpoint(tmp_path, raw, random_tensors(raw))
    with pytest.raises(UnsupportedModelError, match="quantization='gguf' is for GGUF files, and .* is safetensors"):
        load_model(tmp_path, quantization="gguf")
