"""Checkpoints that llm-compressor wrote: the values that compressed-tensors reads there. Logits: tests/engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.layers.product import Weight
from models.loading.load import load_model
from pallas_kernels.quantized_matmul import QuantizedWeight
from tests.quantization.packing import dense
from tests.quantization.test_golden import FUSED

GOLDEN = Path(__file__).parents[1] / "golden" / "quantized"
# name -> (kind, group size, are activations measured beforehand); None = dense.
STORED: dict[str, tuple[str, int, bool] | None] = {
    "fp8-block": ("w8a8_fp8", 32, False),
    "fp8-channel": ("w8a8_fp8", -1, False),
    "fp8-channel-static": ("w8a8_fp8", -1, True),
    "fp8-kv": ("w8a8_fp8", -1, True),
    "fp8-tensor-static": ("w8a8_fp8", -1, True),
    "fp8-weight-only": ("w8a16_fp8", -1, False),
    "mxfp4a16": None,
    "mxfp8a16": None,
    "nvfp4a16": None,
    "w3a16-asym": ("w4a16", 32, False),
    "w4a16-asym": ("w4a16", 32, False),
    "w4a16-channel": ("w4a16", -1, False),
    "w4a16-order": ("w4a16", 32, False),
    "w4a16-sym": ("w4a16", 32, False),
    "w4a8": ("w8a8", 32, False),
    "w8a16": ("w8a16", 32, False),
    "w8a16-asym-channel": ("w8a16", -1, False),
    "w8a8": ("w8a8", -1, False),
    "w8a8-static": ("w8a8", -1, True),
    "w8a8-static-asym": ("w8a8", -1, True),
}
FAST = ("fp8-block", "nvfp4a16", "w4a16-asym", "w8a8-static-asym")


def test_all_are_here() -> None:
    made = sorted(file.parent.name for file in GOLDEN.glob("llmcompressor-*/golden.json"))
    assert made == sorted(f"llmcompressor-{name}" for name in STORED)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in STORED]
)
def test_values(name: str) -> None:
    directory = GOLDEN / f"llmcompressor-{name}"
    loaded = load_model(directory, dtype="float32")
    with np.load(directory / "golden.npz") as golden:
        shown = {key: golden[key] for key in golden if key.startswith("model.")}
    assert len(shown) == 4
    for parameter, modules in FUSED.items():
        weight = loaded.params[f"layers.0.{parameter}.weight"]
        _require_kind(weight, STORED[name])
        values, start = dense(weight), 0
        for module, outputs in modules.items():
            key = f"model.layers.0.{module}"
            if key in shown:
                np.testing.assert_array_equal(values[:, start : start + outputs].T, shown.pop(key), err_msg=key)
            start += outputs
    assert not shown
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert loaded.kv_cache_dtype == ("fp8" if config["kv_cache_scheme"] else None)


def _require_kind(weight: Weight, expected: tuple[str, int, bool] | None) -> None:
    if expected is None:
        assert not isinstance(weight, QuantizedWeight)
    else:
        assert isinstance(weight, QuantizedWeight)
        assert (weight.kind, weight.group_size, weight.static is not None) == expected
