"""compressed-tensors checkpoints: every format, what its options change, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from engine.config import EngineConfig
from engine.runtime.limits import resolve_limits
from models.errors import UnsupportedModelError, WeightsError
from models.layers.product import MixedWeight
from models.loading.load import load_model
from pallas_kernels.quantized_matmul import QuantizedWeight, quantized_matmul
from tests.quantization.packing import pack_stream, require_values, write_quantized

Made = tuple[dict[str, np.ndarray], np.ndarray] | None
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
DYNAMIC: dict[str, Any] = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
}  # fmt: skip
STATIC = DYNAMIC | {"strategy": "tensor", "dynamic": False}


def config_of(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict:
    group = {
        "targets": ["Linear"],
        "weights": {"type": "int", "symmetric": True} | weights,
        "input_activations": inputs,
    }
    config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
    return config | {"ignore": ["lm_head"], "quantization_status": "compressed", "version": "0.20"} | more


def rows(scales: np.ndarray, k: int) -> np.ndarray:
    """float64[N, K] of scales [N, G]."""
    return np.repeat(scales.astype(np.float64), -(-k // scales.shape[1]), 1)[:, :k]


def packed(
    module: str,
    shape: tuple[int, int],
    rng: np.random.Generator,
    bits: int,
    size: int,
    zeros: bool,
    order: bool = False,
) -> Made:
    if module == "lm_head":
        return None
    n, k = shape
    groups = 1 if size < 0 else -(-k // size)
    numbers, scales = rng.integers(0, 1 << bits, (n, k)), rng.uniform(0.5, 1.5, (n, groups)).astype(BF16)
    half = 1 << (bits - 1)
    points = rng.integers(0, 1 << bits, (n, groups)) if zeros else np.full((n, groups), half)
    group_of = np.arange(k) // (k if size < 0 else size)
    tensors = {
        "weight_packed": pack_stream(numbers, bits),
        "weight_scale": scales,
        "weight_shape": np.array(shape, np.int64),
    }
    if zeros:
        tensors["weight_zero_point"] = pack_stream(points.T, bits).T
    if order:
        group_of = np.random.default_rng(k).permutation(group_of)
        tensors["weight_g_idx"] = group_of.astype(np.int32)
    return tensors, (numbers - points[:, group_of]) * scales.astype(np.float64)[:, group_of]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("size", [-1, 32, 16])
@pytest.mark.parametrize("bits", [3, 4, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 5, 6, 7))])
def test_packed(bits: int, size: int, zeros: bool, tmp_path: Path) -> None:
    weights = {"num_bits": bits, "strategy": "channel" if size < 0 else "group", "symmetric": not zeros}
    if size > 0:
        weights |= {"group_size": size, "actorder": "static"}
    config = config_of("pack-quantized", weights)
    values = write_quantized(tmp_path, config, lambda *args: packed(*args, bits, size, zeros))
    loaded = load_model(tmp_path)
    require_values(loaded.params, values)
    assert loaded.quantization is not None and loaded.quantization.startswith("compressed-tensors (w")


def test_activation_order(tmp_path: Path) -> None:
    config = config_of("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "group"})
    values = write_quantized(tmp_path, config, lambda *args: packed(*args, 4, 32, True, order=True))
    with pytest.raises(WeightsError, match="weight_zero_point .*not expected"):
        load_model(tmp_path)
    config["config_groups"]["group_0"]["weights"]["symmetric"] = False
    values = write_quantized(tmp_path, config, lambda *args: packed(*args, 4, 32, True, order=True))
    params = load_model(tmp_path).params
    require_values(params, values)
    weight = params["layers.0.mlp.down.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.input_order is not None


def integers(
    module: str,
    shape: tuple[int, int],
    rng: np.random.Generator,
    strategy: str = "channel",
    static: bool = False,
    point: int | None = None,
    bits: int = 8,
) -> Made:
    if module == "lm_head":
        return None
    n, k = shape
    numbers = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (n, k)).astype(np.int8)
    shapes = {"channel": (n, 1), "tensor": (1,), "group": (n, k // 32)}
    scales = (rng.uniform(0.5, 1.5, shapes[strategy]) / 64).astype(BF16)
    tensors = {"weight": numbers, "weight_scale": scales}
    if static:
        tensors["input_scale"] = np.array([0.03], BF16)
    if point is not None:
        tensors["input_zero_point"] = np.array([point], np.int8)
    return tensors, numbers * rows(scales.reshape(-1, scales.shape[-1] if scales.ndim > 1 else 1), k)


@pytest.mark.parametrize("strategy", ["channel", "tensor", "group"])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_met_by_integers(bits: int, strategy: str, tmp_path: Path) -> None:
    weights = {"num_bits": bits, "strategy": strategy} | ({"group_size": 32} if strategy == "group" else {})
    config = config_of("int-quantized", weights, DYNAMIC)
    values = write_quantized(tmp_path, config, lambda *args: integers(*args, strategy=strategy, bits=bits))
    params = load_model(tmp_path).params
    require_values(params, values)
    weight = params["layers.0.attn.qkv.weight"]
    assert isinstance(weight, QuantizedWeight) and (weight.kind, weight.static) == ("w8a8", None)


@pytest.mark.parametrize("point", [None, -20])
def test_activations_measured_beforehand(point: int | None, tmp_path: Path) -> None:
    config = config_of("int-quantized", {"num_bits": 8, "strategy": "channel"}, STATIC | {"symmetric": point is None})
    values = write_quantized(tmp_path, config, lambda *args: integers(*args, static=True, point=point))
    params = load_model(tmp_path).params
    require_values(params, values)
    weight = params["layers.0.attn.o.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.static is not None
    x = np.random.default_rng(0).standard_normal((3, weight.k)).astype(np.float32)
    scale = np.float32(np.asarray(0.03, BF16))
    numbers = np.clip(np.rint(x / scale + (point or 0)), -128, 127)
    expected = (numbers - (point or 0)) * scale @ values["model.layers.0.self_attn.o_proj.weight"].T
    np.testing.assert_allclose(quantized_matmul(jnp.asarray(x), weight), expected, atol=1e-5 * np.abs(expected).max())


def test_integers_alone(tmp_path: Path) -> None:
    config = config_of("int-quantized", {"num_bits": 8, "strategy": "channel"})
    values = write_quantized(tmp_path, config, integers)
    params = load_model(tmp_path).params
    require_values(params, values)
    weight = params["layers.0.attn.qkv.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.kind == "w8a16"


def test_integers_with_zero_points(tmp_path: Path) -> None:
    """In whole bytes, and met by activations as they are."""

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Made:
        made = integers(module, shape, rng)
        if made is None:
            return None
        tensors, _ = made
        points = rng.integers(-128, 128, (shape[0], 1)).astype(np.int8)
        whole = tensors["weight"].astype(int) - points
        return tensors | {"weight_zero_point": points}, whole * tensors["weight_scale"].astype(np.float64)

    config = config_of("naive-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False})
    config["config_groups"]["group_0"]["format"] = "int-quantized"
    values = write_quantized(tmp_path, config, quantize)
    params = load_model(tmp_path).params
    require_values(params, values)
    weight = params["layers.0.attn.qkv.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.zero_points is not None


def test_packed_and_met_by_integers(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
    config = config_of("pack-quantized", weights, DYNAMIC)
    values = write_quantized(tmp_path, config, lambda *args: packed(*args, 4, 32, False))
    params = load_model(tmp_path).params
    require_values(params, values)
    weight = params["layers.0.mlp.down.weight"]
    assert isinstance(weight, QuantizedWeight) and (weight.kind, weight.group_size) == ("w8a8", 32)


def floats(
    module: str, shape: tuple[int, int], rng: np.random.Generator, strategy: str = "channel", static: bool = False
) -> Made:
    if module == "lm_head":
        return None
    n, k = shape
    numbers = rng.uniform(-448, 448, (n, k)).astype(E4M3)
    shapes = {"channel": (n, 1), "tensor": (1,), "group": (n, k // 32), "block": (-(-n // 48), -(-k // 32))}
    scales = (rng.uniform(0.5, 1.5, shapes[strategy]) / 448).astype(BF16)
    wide = scales.reshape(-1, scales.shape[-1] if scales.ndim > 1 else 1)
    wide = np.repeat(wide, 48, 0)[:n] if strategy == "block" else wide
    tensors = {"weight": numbers, "weight_scale": scales}
    if static:
        tensors |= {"input_scale": np.array([0.01], BF16)}
    return tensors, numbers.astype(np.float64) * rows(wide, k)


FLOAT: dict[str, Any] = {"num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("strategy", "inputs", "kind"),
    [
        ("channel", DYNAMIC | FLOAT, "w8a8_fp8"),
        ("tensor", STATIC | FLOAT, "w8a8_fp8"),
        ("channel", STATIC | FLOAT, "w8a8_fp8"),
        ("block", DYNAMIC | FLOAT | {"strategy": "group", "group_size": 32}, "w8a8_fp8"),
        ("group", DYNAMIC | FLOAT, "w8a8_fp8"),
        ("channel", None, "w8a16_fp8"),
        ("tensor", DYNAMIC | FLOAT | {"strategy": "tensor"}, "w8a8_fp8"),
    ],
)
def test_floats(strategy: str, inputs: dict[str, Any] | None, kind: str, tmp_path: Path) -> None:
    weights = FLOAT | {"strategy": strategy, "block_structure": [48, 32] if strategy == "block" else None}
    weights |= {"group_size": 32} if strategy == "group" else {}
    static = inputs is not None and not inputs["dynamic"]
    values = write_quantized(
        tmp_path,
        config_of("float-quantized", weights, inputs),
        lambda *args: floats(*args, strategy=strategy, static=static),
    )
    params = load_model(tmp_path).params
    require_values(params, values)
    weight = params["layers.0.mlp.down.weight"]
    assert isinstance(weight, QuantizedWeight)
    assert (weight.kind, weight.static is not None, weight.group_size) == (
        kind,
        static,
        32 if strategy in ("block", "group") else -1,
    )


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def small(module: str, shape: tuple[int, int], rng: np.random.Generator, layout: str) -> Made:
    if module == "lm_head":
        return None
    n, k = shape
    nibbles, exponents = rng.integers(0, 16, (n, k)), rng.integers(120, 130, (n, k // 32)).astype(np.uint8)
    if layout == "mxfp8-quantized":
        numbers = rng.uniform(-448, 448, (n, k)).astype(E4M3)
        tensors = {"weight": numbers, "weight_scale": exponents}
        return tensors, numbers.astype(np.float64) * rows(2.0 ** (exponents.astype(int) - 127), k)
    values = np.array(E2M1)[nibbles]
    tensors = {"weight_packed": (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.uint8)}
    if layout == "mxfp4-pack-quantized":
        return tensors | {"weight_scale": exponents}, values * rows(2.0 ** (exponents.astype(int) - 127), k)
    scales, whole = rng.uniform(1, 400, (n, k // 16)).astype(E4M3), np.array([512.0], np.float32)
    tensors |= {"weight_scale": scales, "weight_global_scale": whole, "input_global_scale": whole}
    return tensors, values * rows(scales.astype(np.float64) / whole[0], k)


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
        ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
        ("mxfp8-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
    ],
)
def test_small_groups_become_dense(layout: str, weights: dict[str, Any], tmp_path: Path) -> None:
    values = write_quantized(tmp_path, config_of(layout, weights), lambda *args: small(*args, layout))
    loaded = load_model(tmp_path)
    require_values(loaded.params, values)
    assert loaded.quantization == "compressed-tensors (dequantized)"


def test_groups_of_modules(tmp_path: Path) -> None:
    """Names go before classes, an ignored module is plain, and each group may have a format of its own."""
    config = config_of("mixed-precision", {"num_bits": 4, "strategy": "group", "group_size": 32})
    groups = config["config_groups"]
    groups["group_1"] = {
        "targets": ["re:.*mlp.*", "model.layers.1.self_attn.q_proj"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "input_activations": DYNAMIC,
        "format": "int-quantized",
    }
    config["ignore"] = ["lm_head", "re:.*layers.0.self_attn.[kv]_proj"]

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Made:
        if module in ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"):
            return None
        if "mlp" in module or module == "model.layers.1.self_attn.q_proj":
            return integers(module, shape, rng)
        return packed(module, shape, rng, 4, 32, False)

    values = write_quantized(tmp_path, config, quantize)
    params = load_model(tmp_path).params
    require_values(params, values)
    for layer, kinds in ((0, ["w4a16", None, None]), (1, ["w8a8", "w4a16", "w4a16"])):
        mixed = params[f"layers.{layer}.attn.qkv.weight"]
        assert isinstance(mixed, MixedWeight)
        assert [getattr(part, "kind", None) for part in mixed.parts] == kinds


def test_names_of_fused_modules(tmp_path: Path) -> None:
    """`qkv_proj` and `gate_up_proj` stand for their parts, as targets and among what is ignored."""
    config = config_of("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32})
    config["config_groups"]["group_1"] = {
        "targets": ["re:.*qkv_proj$"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "format": "int-quantized",
    }
    config["ignore"] = ["lm_head", "model.layers.1.mlp.gate_up_proj"]

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Made:
        if module in ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"):
            return None
        if module.endswith(("q_proj", "k_proj", "v_proj")):
            return integers(module, shape, rng)
        return packed(module, shape, rng, 4, 32, False)

    values = write_quantized(tmp_path, config, quantize)
    params = load_model(tmp_path).params
    require_values(params, values)
    kinds = [getattr(params[f"layers.1.{name}.weight"], "kind", None) for name in ("attn.qkv", "attn.o", "mlp.gate_up")]
    assert kinds == ["w8a16", "w4a16", None]


@pytest.mark.parametrize(("kind", "expected"), [("float", "float8_e4m3fn"), ("int", "int8")])
def test_the_cache_of_a_checkpoint(kind: str, expected: str, tmp_path: Path) -> None:
    """Its dtype is taken where the user says nothing; its scales are not needed."""

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Made:
        made = floats(module, shape, rng)
        if made is not None and module.endswith("k_proj"):
            made[0]["output_scale"] = np.array([0.1], np.float32)
        return made

    cache = {"num_bits": 8, "type": kind, "strategy": "tensor", "symmetric": True, "dynamic": False}
    config = config_of("float-quantized", FLOAT | {"strategy": "channel"}, DYNAMIC | FLOAT, kv_cache_scheme=cache)
    values = write_quantized(tmp_path, config, quantize)
    loaded = load_model(tmp_path)
    require_values(loaded.params, values)
    settings = EngineConfig.from_flat(model=str(tmp_path), max_num_seqs=4)
    found = resolve_limits(settings, loaded.config, loaded.dtype, loaded.kv_cache_dtype)
    assert found.kv_dtype == expected
    asked = EngineConfig.from_flat(model=str(tmp_path), max_num_seqs=4, kv_cache_dtype="int8")
    assert resolve_limits(asked, loaded.config, loaded.dtype, loaded.kv_cache_dtype).kv_dtype == "int8"


@pytest.mark.parametrize(
    ("weights", "inputs", "more", "message"),
    [
        ({"num_bits": 9}, None, {}, "num_bits is 9; it must be one of 2, 3"),
        ({"num_bits": 4, "strategy": "rows"}, None, {}, "strategy is 'rows'"),
        ({"num_bits": 4, "strategy": "group"}, None, {}, "group_size is None"),
        ({"num_bits": 4}, None, {"format": "marlin-24"}, "format is 'marlin-24'"),
        ({"num_bits": 4}, None, {"transform_config": {"config_groups": {"a": {}}}}, "transform_config rotates"),
        ({"num_bits": 4}, None, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        ({"num_bits": 4}, None, {"quantization_status": "frozen"}, "quantization_status is 'frozen'"),
        ({"num_bits": 4}, None, {"kv_cache_scheme": {"num_bits": 4, "type": "int"}}, "kv_cache_scheme is"),
        ({"num_bits": 4}, DYNAMIC | FLOAT, {}, "met by 8-bit float activations are not supported"),
        ({"num_bits": 4}, DYNAMIC | {"num_bits": 4}, {}, "met by 4-bit int activations"),
        ({"num_bits": 8, "symmetric": False}, DYNAMIC, {}, "weights with zero points are not supported where"),
        ({"num_bits": 8}, DYNAMIC | {"symmetric": False}, {}, "must be measured beforehand"),
        ({"num_bits": 8}, STATIC | {"strategy": "channel"}, {}, "must have one for the tensor"),
        ({"num_bits": 4}, None, {"ignore": ["re:("]}, "invalid pattern"),
        ({"num_bits": 4}, None, {"config_groups": {}}, "names no modules"),
    ],
)
def test_refusals(
    weights: dict[str, Any], inputs: dict[str, Any] | None, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = config_of("pack-quantized", {"strategy": "channel"} | weights, inputs, **more)
    write_quantized(tmp_path, config, lambda *args: packed(*args, 4, -1, False))
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path)


def test_an_ignored_module_that_is_quantized(tmp_path: Path) -> None:
    config = config_of("pack-quantized", {"num_bits": 4, "strategy": "channel"}, ignore=["re:.*q_proj"])
    write_quantized(tmp_path, config, lambda *args: packed(*args, 4, -1, False))
    with pytest.raises(WeightsError, match="q_proj.weight is missing"):
        load_model(tmp_path)
