"""AWQ and AutoRound checkpoints: both layouts, zero points, mixed bits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import UnsupportedModelError, WeightsError
from models.layers.product import MixedWeight
from models.loading.load import load_model
from pallas_kernels.quantized_matmul import QuantizedWeight
from tests.quantization.packing import pack_stream, require_values, write_quantized

Made = tuple[dict[str, np.ndarray], np.ndarray] | None


def pack_columns(numbers: np.ndarray) -> np.ndarray:
    """int32[R, N / 8]: column 8 w + c of a row lies at nibble place_of[c] of word w."""
    place_of = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
    words = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
    for column in range(numbers.shape[1]):
        words[:, column // 8] |= numbers[:, column].astype(np.uint32) << np.uint32(4 * place_of[column % 8])
    return words.view(np.int32)


def random_numbers(
    shape: tuple[int, int], rng: np.random.Generator, bits: int, size: int, sym: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Numbers [N, K], zero points [G, N], scales of either sign [G, N], values [N, K]."""
    n, k = shape
    size = k if size < 0 else size
    numbers = rng.integers(0, 1 << bits, (n, k))
    zeros = rng.integers(0, 1 << bits, (-(-k // size), n))
    if sym:
        zeros[:] = 1 << (bits - 1)
    scales = (rng.uniform(0.5, 1.5, zeros.shape) * rng.choice([-1, 1], zeros.shape)).astype(np.float16)
    group = np.arange(k) // size
    return numbers, zeros, scales, (numbers - zeros[group].T) * scales[group].T.astype(np.float64)


def awq(module: str, shape: tuple[int, int], rng: np.random.Generator, size: int = 32, zeros: bool = True) -> Made:
    if module == "lm_head":
        return None
    numbers, points, scales, values = random_numbers(shape, rng, 4, size, sym=not zeros)
    tensors = {"qweight": pack_columns(numbers.T), "scales": scales}
    return tensors | ({"qzeros": pack_columns(points)} if zeros else {}), values


def gptq_layout(
    module: str, shape: tuple[int, int], rng: np.random.Generator, bits: int, size: int, less: int, sym: bool = True
) -> Made:
    if module == "lm_head":
        return None
    numbers, zeros, scales, values = random_numbers(shape, rng, bits, size, sym)
    return {
        "qweight": pack_stream(numbers, bits).T,
        "qzeros": pack_stream(zeros - less, bits),
        "scales": scales,
    }, values


AWQ: dict[str, Any] = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM",
    "modules_to_not_convert": None,
}  # fmt: skip
AUTO_ROUND: dict[str, Any] = {
    "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int",
    "packing_format": "auto_round:auto_gptq", "act_bits": 16, "iters": 200,
}  # fmt: skip


@pytest.mark.parametrize("size", [-1, 16, 32, 64])
@pytest.mark.parametrize("zeros", [False, True])
def test_awq(zeros: bool, size: int, tmp_path: Path) -> None:
    values = write_quantized(
        tmp_path, AWQ | {"group_size": size, "zero_point": zeros}, lambda *args: awq(*args, size=size, zeros=zeros)
    )
    params = load_model(tmp_path).params
    require_values(params, values)
    weight = params["layers.0.attn.qkv.weight"]
    assert isinstance(weight, QuantizedWeight) and (weight.zero_points is not None) == zeros


def test_old_awq_configs(tmp_path: Path) -> None:
    values = write_quantized(tmp_path, None, awq)
    (tmp_path / "quant_config.json").write_text('{"zero_point": true, "q_group_size": 32, "w_bit": 4}')
    require_values(load_model(tmp_path).params, values)


def test_awq_leaves_out_what_is_plain(tmp_path: Path) -> None:
    values = write_quantized(
        tmp_path,
        AWQ | {"modules_to_not_convert": ["k_proj", "lm_head"]},
        lambda module, *rest: None if module.endswith("k_proj") else awq(module, *rest),
    )
    params = load_model(tmp_path).params
    require_values(params, values)
    assert isinstance(params["layers.1.attn.qkv.weight"], MixedWeight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits is 8; it must be 4 for AWQ"),
        ({"version": "gemv"}, "version is 'gemv'; it must be gemm"),
        ({"group_size": 0}, "group_size is 0"),
    ],
)
def test_awq_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, AWQ | changes, awq)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path)


def test_awq_tensors_that_contradict_the_config(tmp_path: Path) -> None:
    write_quantized(tmp_path, AWQ | {"group_size": 64}, awq)
    with pytest.raises(WeightsError, match=r"qzeros is \[2, 8\], expected \[1, 8\]|scales is .*expected"):
        load_model(tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("layout", "less"), [("auto_round:auto_gptq", 1), ("auto_round", 0), ("auto_round:gptq:exllamav2", 1)]
)
def test_auto_round(layout: str, less: int, bits: int, tmp_path: Path) -> None:
    """Without g_idx, and with scales of either sign."""
    config = AUTO_ROUND | {"bits": bits, "packing_format": layout}
    values = write_quantized(tmp_path, config, lambda *args: gptq_layout(*args, bits, 32, less))
    loaded = load_model(tmp_path)
    require_values(loaded.params, values)
    assert loaded.quantization is not None and loaded.quantization.startswith("auto-round (w")


def test_auto_round_with_zero_points_as_they_are(tmp_path: Path) -> None:
    config = AUTO_ROUND | {"sym": False, "packing_format": "auto_round", "bits": 3}
    values = write_quantized(tmp_path, config, lambda *args: gptq_layout(*args, 3, 32, 0, sym=False))
    require_values(load_model(tmp_path).params, values)


def test_auto_round_in_awq_layout(tmp_path: Path) -> None:
    config = AUTO_ROUND | {"packing_format": "auto_round:auto_awq", "quant_method": "intel/auto-round"}
    values = write_quantized(tmp_path, config, awq)
    require_values(load_model(tmp_path).params, values)


def test_auto_round_with_mixed_bits(tmp_path: Path) -> None:
    """A module's own name, the end of its name, and a pattern; what a rule does not say is as everywhere."""
    extra = {
        "model.layers.0.self_attn.q_proj": {"bits": 8},
        "layers.1.mlp.down_proj": {"group_size": 16},
        r".*\.1\.self_attn\..*": {"bits": 2, "group_size": 64},
        "model.layers.0.self_attn.v_proj": {"bits": 16},
    }

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Made:
        bits, size = 4, 32
        if module == "model.layers.0.self_attn.q_proj":
            bits = 8
        elif module == "model.layers.1.mlp.down_proj":
            size = 16
        elif ".1.self_attn." in module:
            bits, size = 2, 64
        elif module == "model.layers.0.self_attn.v_proj":
            return None
        return gptq_layout(module, shape, rng, bits, size, 1)

    values = write_quantized(tmp_path, AUTO_ROUND | {"extra_config": extra}, quantize)
    params = load_model(tmp_path).params
    require_values(params, values)
    mixed = params["layers.0.attn.qkv.weight"]
    assert isinstance(mixed, MixedWeight)
    assert [getattr(part, "bits", None) for part in mixed.parts] == [8, 4, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_type": "mx_fp4"}, "data_type is 'mx_fp4'"),
        ({"act_bits": 8}, "act_bits is 8; it must be 16 or more"),
        ({"packing_format": "auto_round:fp8_static"}, "packing_format is 'auto_round:fp8_static'"),
        ({"extra_config": {"a": 3}}, r"extra_config\['a'\] is 3; it must be an object"),
        ({"extra_config": {"(": {"bits": 2}}}, "invalid pattern"),
        ({"bits": 8, "packing_format": "auto_round:auto_awq"}, "has 4 bits, and quantization_config 8"),
    ],
)
def test_auto_round_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, AUTO_ROUND | changes, lambda *args: gptq_layout(*args, 4, 32, 1))
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path)
