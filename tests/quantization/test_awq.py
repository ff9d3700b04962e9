"""AWQ checkpoints: with zero points and without, group sizes, names of the config's fields, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import UnsupportedModelError, WeightsError
from models.layers.product import MixedWeight
from models.loading.load import load_model
from pallas_kernels.quantized_matmul import QuantizedWeight
from tests.quantization.packing import Quantize, pack_awq, require_values, write_quantized


def awq_tensors(
    shape: tuple[int, int], rng: np.random.Generator, group_size: int = 32, zero_point: bool = True
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random tensors of one module, and the values that they stand for."""
    n, k = shape
    size = k if group_size < 0 else group_size
    groups = -(-k // size)
    numbers = rng.integers(0, 16, (k, n))
    zeros = rng.integers(0, 16, (groups, n)) if zero_point else np.full((groups, n), 8)
    scales = (rng.uniform(0.5, 1.5, (groups, n)) * rng.choice([-1, 1], (groups, n))).astype(np.float16)
    values = np.empty((n, k))
    for i in range(k):
        values[:, i] = (numbers[i] - zeros[i // size]) * scales[i // size].astype(np.float64)
    return {"qweight": pack_awq(numbers), "qzeros": pack_awq(zeros), "scales": scales}, values


def config_of(**changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
        "provider": "something else",
        **changes,
    }


def everything(*plain: str, without: tuple[str, ...] = (), **how: Any) -> Quantize:
    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        if any(part in module for part in ("lm_head", *plain)):
            return None
        tensors, values = awq_tensors(shape, rng, **how)
        return {name: each for name, each in tensors.items() if name not in without}, values

    return quantize


@pytest.mark.parametrize("group_size", [-1, 16, 32, 64])
@pytest.mark.parametrize("zero_point", [True, False])
def test_bit_for_bit(zero_point: bool, group_size: int, tmp_path: Path) -> None:
    """Inputs are 64 and 96: of groups of 64 the last may be short."""
    config = config_of(group_size=group_size, zero_point=zero_point)
    values = write_quantized(tmp_path, config, everything(group_size=group_size, zero_point=zero_point))
    loaded = load_model(tmp_path)
    require_values(loaded.params, values)
    weight = loaded.params["layers.1.mlp.gate_up.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.kind == "w4a16"
    assert (weight.zero_points is not None) == zero_point
    assert loaded.quantization is not None and loaded.quantization.startswith("awq (w4a16")


def test_no_zero_points_at_all(tmp_path: Path) -> None:
    quantize = everything(zero_point=False, without=("qzeros",))
    values = write_quantized(tmp_path, config_of(zero_point=False), quantize)
    require_values(load_model(tmp_path).params, values)


def test_modules_that_are_not_converted(tmp_path: Path) -> None:
    config = config_of(modules_to_not_convert=["k_proj", "layers.1.mlp"])
    values = write_quantized(tmp_path, config, everything("k_proj", "layers.1.mlp"))
    params = load_model(tmp_path).params
    require_values(params, values)
    mixed = params["layers.0.attn.qkv.weight"]
    assert isinstance(mixed, MixedWeight)
    assert [isinstance(part, QuantizedWeight) for part in mixed.parts] == [True, False, True]
    assert not isinstance(params["layers.1.mlp.down.weight"], QuantizedWeight)


def test_a_quantized_head(tmp_path: Path) -> None:
    values = write_quantized(tmp_path, config_of(lm_head=True), lambda module, shape, rng: awq_tensors(shape, rng))
    params = load_model(tmp_path).params
    require_values(params, values)
    assert isinstance(params["head.weight"], QuantizedWeight)


def test_a_config_beside_the_config(tmp_path: Path) -> None:
    """AutoAWQ's own file and names."""
    values = write_quantized(tmp_path, None, everything())
    config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(config))
    require_values(load_model(tmp_path).params, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"version": name}, f"quantization_config.version is '{name}'; it must be gemm")
            for name in ("gemv", "gemv_fast", "marlin", "llm-awq")
        ),
        ({"backend": "llm-awq"}, "quantization_config.backend is 'llm-awq'"),
        ({"bits": 8}, "quantization_config.bits is 8; it must be 4"),
        ({"bits": None, "w_bit": 3}, "quantization_config.w_bit is 3; it must be 4"),
        ({"group_size": None}, "quantization_config.group_size is None"),
        ({"zero_point": "yes"}, "zero_point is 'yes'; it must be true or false"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'; it must be a list"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, config_of() | changes, everything())
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({"group_size": 16}, {}, "misshapen.*qzeros is .*expected"),
        ({"zero_point": False}, {}, "q_proj.weight: its config says that it has no zero points"),
        ({}, {"without": ("qzeros",)}, "qzeros is missing"),
        ({"modules_to_not_convert": ["q_proj"]}, {}, "q_proj.weight is missing.*q_proj.qweight.* is not expected"),
    ],
)
def test_tensors_that_contradict_the_config(
    changes: dict[str, Any], how: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_quantized(tmp_path, config_of(**changes), everything(**how))
    with pytest.raises(WeightsError, match=message):
        load_model(tmp_path)


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        tensors, values = awq_tensors(shape, rng)
        tensors["scales"][0, 1] = np.inf
        return tensors, values

    write_quantized(tmp_path, config_of(), quantize)
    with pytest.raises(WeightsError, match="not finite"):
        load_model(tmp_path)
