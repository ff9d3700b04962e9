"""Checkpoints that AutoRound and GPTQModel wrote: the values that their own classes read. Logits: tests/engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.loading.load import load_model
from pallas_kernels.quantized_matmul import QuantizedWeight
from tests.quantization.packing import dense

GOLDEN = Path(__file__).parents[1] / "golden" / "quantized"
NAMES = [
    "autoround-asym2",
    "autoround-asym3",
    "autoround-asym4-awq",
    "autoround-asym4-gptq",
    "autoround-mixed",
    "autoround-mxfp4",
    "autoround-sym4",
    "autoround-sym8",
    "autoround-to-awq",
    "autoround-to-gptq",
    "gptqmodel-act-order",
]
SLOW = ("autoround-asym2", "autoround-sym8", "autoround-to-gptq")  # what takes time is to compile the unpacking
FUSED = {
    "attn.qkv": {"self_attn.q_proj": 64, "self_attn.k_proj": 32, "self_attn.v_proj": 32},
    "mlp.gate_up": {"mlp.gate_proj": 96, "mlp.up_proj": 96},
    "mlp.down": {"mlp.down_proj": 64},
}


def test_all_are_here() -> None:
    made = [*GOLDEN.glob("autoround-*/golden.json"), *GOLDEN.glob("gptqmodel-*/golden.json")]
    assert sorted(file.parent.name for file in made) == NAMES


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES]
)
def test_values(name: str) -> None:
    params = load_model(GOLDEN / name).params
    with np.load(GOLDEN / name / "golden.npz") as golden:
        shown = [key for key in golden if key.startswith("model.")]
        assert len(shown) == 4
        for parameter, modules in FUSED.items():
            values, start = dense(params[f"layers.0.{parameter}.weight"]), 0
            for module, outputs in modules.items():
                key = f"model.layers.0.{module}"
                if key in shown:
                    np.testing.assert_array_equal(values[:, start : start + outputs].T, golden[key], err_msg=key)
                start += outputs


def test_symmetric_scales_are_signed() -> None:
    weight = load_model(GOLDEN / "autoround-sym4").params["layers.0.mlp.down.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.zero_points is None
    assert 0.2 < float((weight.scales < 0).mean()) < 0.8


def test_activation_order() -> None:
    weight = load_model(GOLDEN / "gptqmodel-act-order").params["layers.0.attn.qkv.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.zero_points is not None
    order = weight.input_order
    assert order is not None and not np.array_equal(order, np.arange(64))


def test_rules_of_modules_are_the_tools_own() -> None:
    config = json.loads((GOLDEN / "autoround-mixed" / "config.json").read_text())["quantization_config"]
    assert any("*" in key for key in config["extra_config"])
    params = load_model(GOLDEN / "autoround-mixed").params
    assert not isinstance(params["layers.1.attn.o.weight"], QuantizedWeight)
    down = params["layers.0.mlp.down.weight"]
    assert isinstance(down, QuantizedWeight) and down.group_size == 16
