"""Checkpoints of NVIDIA's Model Optimizer, and MXFP4: every algorithm, both places of the config, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import UnsupportedModelError, WeightsError
from models.loading.load import load_model
from models.quantization.mxfp4 import from_mxfp4
from pallas_kernels.quantized_matmul import QuantizedWeight
from tests.quantization.packing import Quantize, require_values, write_quantized
from tests.quantization.test_fp8 import E4M3, in_blocks, per_output, per_tensor, random_e4m3

CACHE = ("kv_cache_quant_algo", "FP8")


def e2m1(nibble: int) -> float:
    """By the definition: a sign, two bits of exponent (bias 1), one bit of mantissa."""
    sign, exponent, mantissa = -1.0 if nibble & 8 else 1.0, nibble >> 1 & 3, nibble & 1
    return sign * (mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa * 0.5))


def values_of(packed: np.ndarray, k: int) -> np.ndarray:
    """float64[N, K] of uint8[N, K/2]: even inputs are the low nibbles."""
    return np.array([[e2m1(int(row[j // 2]) >> (4 * (j % 2)) & 15) for j in range(k)] for row in packed])


def nvfp4(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
    if module == "lm_head":
        return None
    n, k = shape
    packed = rng.integers(0, 256, (n, k // 2)).astype(np.uint8)
    scales = rng.uniform(1, 448, (n, k // 16)).astype(E4M3)
    scale_2 = np.float32(rng.uniform(1e-4, 1e-3))
    both = scales.astype(np.float32) * scale_2  # rounded to float32, as the tool itself computes
    values = values_of(packed, k) * np.repeat(both, 16, axis=1).astype(np.float64)
    stored = {"weight": packed, "weight_scale": scales, "weight_scale_2": np.asarray(scale_2)}
    return stored | {"input_scale": np.asarray(np.float32(0.01))}, values


def mxfp8(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
    if module == "lm_head":
        return None
    numbers, scales = random_e4m3(shape, rng), rng.integers(110, 130, (shape[0], shape[1] // 32)).astype(np.uint8)
    values = numbers.astype(np.float64) * np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, axis=1)
    return {"weight": numbers, "weight_scale": scales}, values


def pb_wo(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
    made = in_blocks((128, 128), suffix="weight_scale")(module, shape, rng)
    if made is not None:
        made[0]["weight_scale"] = made[0]["weight_scale"][:, None, :, None]
    return made


ALGORITHMS: dict[str, tuple[Quantize, str | None]] = {  # how it is written, and what kind it is on the device
    "FP8": (per_tensor((), static=True), "w8a8_fp8"),
    "FP8_PER_CHANNEL_PER_TOKEN": (per_output("[N]"), "w8a8_fp8"),
    "FP8_PB_WO": (pb_wo, "w8a16_fp8"),
    "fp8_pb_wo": (in_blocks((128, 128)), "w8a16_fp8"),
    "NVFP4": (nvfp4, None),
    "W4A16_NVFP4": (nvfp4, None),
    "MXFP8": (mxfp8, None),
}


def inlined(algorithm: str | None, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], "producer": {}, **changes}


def beside(directory: Path, algorithm: str | None, **changes: Any) -> None:
    inner = {"quant_algo": algorithm, "exclude_modules": ["lm_head"], CACHE[0]: CACHE[1], **changes}
    (directory / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": inner})
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bit_for_bit(algorithm: str, tmp_path: Path) -> None:
    quantize, kind = ALGORITHMS[algorithm]
    values = write_quantized(tmp_path, inlined(algorithm), quantize)
    loaded = load_model(tmp_path)
    require_values(loaded.params, values)
    weight = loaded.params["layers.1.mlp.down.weight"]
    assert (weight.kind if isinstance(weight, QuantizedWeight) else None) == kind
    if algorithm == "FP8":
        assert isinstance(weight, QuantizedWeight) and weight.static is not None
        assert float(weight.static.scale) == 0.0625


def test_a_config_beside_the_config(tmp_path: Path) -> None:
    """With scales of a cache, which are left aside."""

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        made = per_tensor((), static=True)(module, shape, rng)
        if made is not None and module.endswith("k_proj"):
            made[0]["k_scale"] = np.asarray(np.float32(0.5))
        return made

    values = write_quantized(tmp_path, None, quantize)
    beside(tmp_path, "FP8")
    require_values(load_model(tmp_path).params, values)


def test_mixed_precision(tmp_path: Path) -> None:
    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        if "mlp" in module:
            return nvfp4(module, shape, rng)
        return per_output()(module, shape, rng) if "o_proj" in module else None

    layers = {
        f"model.layers.{layer}.{module}": {"quant_algo": algorithm, "group_size": 16}
        for layer in range(2)
        for module, algorithm in (
            ("mlp.gate_proj", "NVFP4"),
            ("mlp.up_proj", "NVFP4"),
            ("mlp.down_proj", "W4A16_NVFP4"),
            ("self_attn.o_proj", "FP8_PER_CHANNEL_PER_TOKEN"),
        )
    }
    values = write_quantized(tmp_path, inlined("MIXED_PRECISION", quantized_layers=layers), quantize)
    params = load_model(tmp_path).params
    require_values(params, values)
    assert isinstance(params["layers.0.attn.o.weight"], QuantizedWeight)


def test_only_the_cache_is_quantized(tmp_path: Path) -> None:
    values = write_quantized(tmp_path, inlined(None, kv_cache_scheme={"type": "float"}), lambda *_: None)
    require_values(load_model(tmp_path).params, values)


def test_a_quantized_head(tmp_path: Path) -> None:
    """Which lies [out, in] on the device, dense or packed."""
    values = write_quantized(tmp_path, inlined("NVFP4", ignore=[]), lambda _, shape, rng: nvfp4("m", shape, rng))
    require_values(load_model(tmp_path).params, values)


@pytest.mark.parametrize("pattern", ["model.layers.0*", "*layers.0.*", "model.layers.0"])
def test_excluded_by_a_pattern(pattern: str, tmp_path: Path) -> None:
    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        return None if ".0." in module else nvfp4(module, shape, rng)

    values = write_quantized(tmp_path, inlined("NVFP4", ignore=[pattern, "lm_head"]), quantize)
    require_values(load_model(tmp_path).params, values)
    write_quantized(tmp_path, inlined("NVFP4", ignore=[pattern, "lm_head"]), nvfp4)
    with pytest.raises(WeightsError, match="layers.0.*weight is uint8, expected float64"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quant_algo": "NVFP4_AWQ"},
            "quant_algo is 'NVFP4_AWQ'; it must be FP8, .*MIXED_PRECISION",
        ),
        ({"quant_algo": None}, "quantization_config.quant_algo is None"),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"lm_head": {"quant_algo": "W4A8_AWQ"}}},
            r"quantized_layers\['lm_head'\].quant_algo is 'W4A8_AWQ'",
        ),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"lm_head": 8}},
            "is 8; it must be an object",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, inlined("FP8") | changes, per_tensor())
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path)


def test_tensors_that_contradict_the_config(tmp_path: Path) -> None:
    write_quantized(tmp_path, inlined("NVFP4", group_size=32), nvfp4)
    with pytest.raises(WeightsError, match=r"weight_scale is \[64, 4\], expected \[64, 2\]"):
        load_model(tmp_path)


def mxfp4(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
    if module == "lm_head":
        return None
    n, k = shape
    packed, scales = rng.integers(0, 256, (n, k // 2)), rng.integers(100, 130, (n, k // 32)).astype(np.uint8)
    packed = packed.astype(np.uint8)
    values = values_of(packed, k) * np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, axis=1)
    return {"weight_blocks": packed.reshape(n, k // 32, 16), "weight_scales": scales}, values


def test_mxfp4(tmp_path: Path) -> None:
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router", "lm_head"]}
    values = write_quantized(tmp_path, config, mxfp4)
    loaded = load_model(tmp_path)
    require_values(loaded.params, values)
    assert loaded.quantization == "mxfp4 (dequantized)"


def test_mxfp4_of_experts() -> None:
    """Any number of leading axes, as gpt-oss has them."""
    blocks = np.arange(256, dtype=np.uint8).reshape(2, 4, 2, 16)
    scales = np.array([[[1, 252], [127, 128], [120, 1], [2, 3]], [[126, 127], [0, 252], [130, 131], [9, 8]]], np.uint8)
    found = from_mxfp4(blocks, scales)
    assert found.shape == (2, 4, 64) and found.dtype == np.float32
    for e, n, j in np.ndindex(found.shape):
        nibble = int(blocks[e, n, j // 32, j % 32 // 2]) >> (4 * (j % 2)) & 15
        assert found[e, n, j] == e2m1(nibble) * 2.0 ** (int(scales[e, n, j // 32]) - 127)


def test_a_scale_that_is_no_number(tmp_path: Path) -> None:
    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        made = mxfp4(module, shape, rng)
        if made is not None and module.endswith("0.mlp.down_proj"):
            made[0]["weight_scales"][3, 1] = 255
        return made

    write_quantized(tmp_path, {"quant_method": "mxfp4"}, quantize)
    with pytest.raises(WeightsError, match="down_proj.weight: its scales hold bytes of 255"):
        load_model(tmp_path)


def test_gpt_oss_is_refused_by_its_architecture(tmp_path: Path) -> None:
    write_quantized(tmp_path, {"quant_method": "mxfp4"}, mxfp4)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["GptOssForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="GptOssForCausalLM"):
        load_model(tmp_path)
