"""GPTQ checkpoints: every bit width, zero points of both versions, activation order, overrides, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import UnsupportedModelError, WeightsError
from models.layers.product import MixedWeight
from models.loading.load import load_model
from pallas_kernels.quantized_matmul import QuantizedWeight
from tests.quantization.packing import Quantize, pack_stream, require_values, write_quantized


@dataclass(frozen=True)
class Written:
    """How the tests store a module."""

    bits: int = 4
    group_size: int = 32
    sym: bool = False
    version: int = 1
    act_order: bool = False
    uneven: bool = False
    with_g_idx: bool = True


def gptq_tensors(
    written: Written, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random tensors of one module, and the values that they stand for."""
    n, k = shape
    size = k if written.group_size < 0 else written.group_size
    groups = -(-k // size)
    numbers = rng.integers(0, 1 << written.bits, (n, k))
    zeros = rng.integers(1, 1 << written.bits, (groups, n))
    if written.sym:
        zeros[:] = 1 << (written.bits - 1)
    scales = (rng.uniform(0.5, 1.5, (groups, n)) * rng.choice([-1, 1], (groups, n))).astype(np.float16)
    group_of = np.arange(k) // size
    if written.act_order:
        group_of = np.random.default_rng(k).permutation(group_of)  # the same for all that share inputs
    if written.uneven:
        group_of[0] = groups - 1
    tensors = {
        "qweight": pack_stream(numbers, written.bits).T,
        "qzeros": pack_stream(zeros - (2 - written.version), written.bits),
        "scales": scales,
    }
    if written.with_g_idx:
        tensors["g_idx"] = group_of.astype(np.int32)
    values = (numbers - zeros[group_of].T) * scales[group_of].T.astype(np.float64)
    return tensors, values


def config_of(written: Written, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": written.bits,
        "group_size": written.group_size,
        "sym": written.sym,
        "desc_act": written.act_order,
        "checkpoint_format": "gptq" if written.version == 1 else "gptq_v2",
        "provider": "something else",
        **changes,
    }


def everything(written: Written, *, head: bool = False) -> Quantize:
    return lambda module, shape, rng: gptq_tensors(written, shape, rng) if head or module != "lm_head" else None


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 16])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bit_for_bit(bits: int, version: int, group_size: int, act_order: bool, tmp_path: Path) -> None:
    written = Written(bits, group_size, sym=False, version=version, act_order=act_order)
    values = write_quantized(tmp_path, config_of(written), everything(written))
    loaded = load_model(tmp_path)
    require_values(loaded.params, values)
    weight = loaded.params["layers.1.attn.qkv.weight"]
    assert isinstance(weight, QuantizedWeight)
    assert weight.bits == (4 if bits <= 4 else 8)
    assert (weight.input_order is not None) == (act_order and group_size > 0)
    assert loaded.quantization is not None and loaded.quantization.startswith("gptq (w")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric(bits: int, tmp_path: Path) -> None:
    written = Written(bits, sym=True, with_g_idx=False)
    values = write_quantized(tmp_path, config_of(written), everything(written))
    params = load_model(tmp_path).params
    require_values(params, values)
    weight = params["layers.0.mlp.gate_up.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.zero_points is None


def test_a_short_last_group(tmp_path: Path) -> None:
    """96 inputs in groups of 64: three of the kernel's groups of 32, two of which have one scale."""
    written = Written(group_size=64)
    values = write_quantized(tmp_path, config_of(written), everything(written))
    params = load_model(tmp_path).params
    require_values(params, values)
    weight = params["layers.0.mlp.down.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.group_size == 32


def test_groups_that_no_kernel_has(tmp_path: Path) -> None:
    """Not all of one size: dense, and right."""
    written = Written(uneven=True)
    values = write_quantized(tmp_path, config_of(written), everything(written))
    params = load_model(tmp_path).params
    require_values(params, values)
    assert not isinstance(params["layers.0.mlp.down.weight"], QuantizedWeight)


def test_an_order_of_inputs_and_a_short_last_group(tmp_path: Path) -> None:
    written = Written(group_size=64, act_order=True)
    values = write_quantized(tmp_path, config_of(written), everything(written))
    params = load_model(tmp_path).params
    require_values(params, values)
    assert isinstance(params["layers.0.mlp.down.weight"], QuantizedWeight)


@pytest.mark.parametrize("group", [-1, 3])
def test_groups_that_are_not_there(group: int, tmp_path: Path) -> None:
    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        if module == "lm_head":
            return None
        tensors, values = gptq_tensors(Written(), shape, rng)
        tensors["g_idx"][5] = group
        return tensors, values

    write_quantized(tmp_path, config_of(Written()), quantize)
    with pytest.raises(WeightsError, match="q_proj.weight: its inputs are of groups"):
        load_model(tmp_path)


def test_a_quantized_head(tmp_path: Path) -> None:
    written = Written()
    values = write_quantized(tmp_path, config_of(written, lm_head=True), everything(written, head=True))
    params = load_model(tmp_path).params
    require_values(params, values)
    assert isinstance(params["head.weight"], QuantizedWeight)


def test_overrides(tmp_path: Path) -> None:
    """Other bits for one module, another group size for a layer, and one that is not quantized."""
    rules = {
        "model.layers.0.self_attn.q_proj": Written(8),
        "model.layers.0.self_attn.k_proj": None,
        **{f"model.layers.1.mlp.{name}_proj": Written(4, 16) for name in ("gate", "up", "down")},
    }

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        written = rules.get(module, Written())
        return None if written is None or module == "lm_head" else gptq_tensors(written, shape, rng)

    dynamic = {
        r"-:model\.layers\.0\.self_attn\.k_proj": {},
        r"+:.*\.0\.self_attn\.q_proj": {"bits": 8},
        r"model\.layers\.1\.mlp": {"group_size": 16},
    }
    values = write_quantized(tmp_path, config_of(Written(), dynamic=dynamic), quantize)
    params = load_model(tmp_path).params
    require_values(params, values)
    mixed = params["layers.0.attn.qkv.weight"]
    assert isinstance(mixed, MixedWeight)
    assert [getattr(part, "bits", None) for part in mixed.parts] == [8, None, 4]
    down = params["layers.1.mlp.down.weight"]
    assert isinstance(down, QuantizedWeight) and down.group_size == 16


def test_a_rule_that_excludes_what_is_quantized(tmp_path: Path) -> None:
    config = config_of(Written(), dynamic={r"-:.*\.1\..*k_proj": {}})
    write_quantized(tmp_path, config, everything(Written()))
    with pytest.raises(UnsupportedModelError, match=r"says that model.layers.1.self_attn.k_proj is not quantized, but"):
        load_model(tmp_path)


def test_zero_points_of_zero(tmp_path: Path) -> None:
    """Writers subtract 1 from whole words; where a zero point is 0 the borrow runs on, and must come back."""

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        if module == "lm_head":
            return None
        (tensors, _), (n, k) = gptq_tensors(Written(with_g_idx=False), shape, rng), shape
        zeros = rng.integers(0, 3, (k // 32, n))
        words = pack_stream(zeros, 4).view(np.uint32) - np.uint32(0x11111111)
        numbers = np.stack([(tensors["qweight"].view(np.uint32) >> (4 * i)) & 15 for i in range(8)], 1)
        numbers = numbers.reshape(k, n).T.astype(int)
        values = (numbers - np.repeat(zeros, 32, 0).T) * np.repeat(tensors["scales"], 32, 0).T.astype(np.float64)
        return tensors | {"qzeros": words.view(np.int32)}, values

    values = write_quantized(tmp_path, config_of(Written()), quantize)
    require_values(load_model(tmp_path).params, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "quantization_config.bits is 9; it must be an integer from 2 to 8"),
        ({"bits": None}, "quantization_config.bits is None"),
        ({"group_size": 0}, "quantization_config.group_size is 0"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; it must be gptq or gptq_v2"),
        ({"dynamic": {"(": {}}}, "invalid pattern"),
        ({"quant_method": "hqq"}, "quantized by 'hqq' .*which is not supported; supported are .*gptq"),
        ({"quant_method": None}, "a method that it does not name"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, config_of(Written()) | changes, everything(Written()))
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, r"misshapen.*self_attn.q_proj.qweight is \[8, 64\], expected \[16, 64\]"),
        ({"group_size": 16}, "scales is .*expected"),
    ],
)
def test_tensors_that_contradict_the_config(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, config_of(Written()) | changes, everything(Written()))
    with pytest.raises(WeightsError, match=message):
        load_model(tmp_path)


def test_quantized_twice(tmp_path: Path) -> None:
    write_quantized(tmp_path, config_of(Written()), everything(Written()))
    with pytest.raises(UnsupportedModelError, match=r"quantized already \(gptq\)"):
        load_model(tmp_path, quantization="int8")


def test_a_config_beside_the_config(tmp_path: Path) -> None:
    """Old files: `quantize_config.json`."""
    values = write_quantized(tmp_path, None, everything(Written()))
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": false}')
    require_values(load_model(tmp_path).params, values)


def test_integers_without_a_config(tmp_path: Path) -> None:
    write_quantized(tmp_path, None, everything(Written()))
    with pytest.raises(WeightsError, match="missing"):
        load_model(tmp_path)
