"""Checkpoints of 8-bit floats: blocks, one scale a matrix or an output, static activations, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from engine.config import EngineConfig
from engine.convert import convert_model
from models.errors import UnsupportedModelError, WeightsError
from models.layers.product import MixedWeight, product
from models.loading.load import load_model
from pallas_kernels.quantized_matmul import QuantizedWeight, quantize_activations, quantized_matmul
from tests.quantization.packing import Quantize, dense, require_values, write_quantized

E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
SCALE_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "e8m0": E8M0}
# Of K = 64 and 96 inputs: exact, short at the end, longer than all, and of no kernel.
BLOCKS = [(32, 32), (128, 128), (64, 64), (48, 16), (16, 24)]


def random_e4m3(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Any number but NaN, those below the normal ones too."""
    numbers = rng.integers(0, 256, shape).astype(np.uint8)
    numbers[(numbers & 0x7F) == 0x7F] = 0x7E
    return numbers.view(E4M3)


def random_scales(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    scales = rng.uniform(0.01, 0.03, shape)
    return (2.0 ** rng.integers(-9, -4, shape) if dtype == "e8m0" else scales).astype(SCALE_DTYPES[dtype])


def in_blocks(block: tuple[int, int], dtype: str = "float32", suffix: str = "weight_scale_inv") -> Quantize:
    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        if module == "lm_head":
            return None
        (n, k), numbers = shape, random_e4m3(shape, rng)
        scales = random_scales((-(-n // block[0]), -(-k // block[1])), dtype, rng)
        values = np.empty(shape, np.float64)
        for row in range(n):
            for column in range(k):
                values[row, column] = float(numbers[row, column]) * float(scales[row // block[0], column // block[1]])
        return {"weight": numbers, suffix: scales}, values

    return quantize


def per_tensor(
    shape_of_scale: tuple[int, ...] = (),
    static: bool = False,
    suffixes: tuple[str, str] = ("weight_scale", "input_scale"),
) -> Quantize:
    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        if module == "lm_head":
            return None
        numbers, scale = random_e4m3(shape, rng), random_scales(shape_of_scale, "float32", rng)
        tensors = {"weight": numbers, suffixes[0]: np.asarray(scale)}
        if static:  # the same for all that share inputs, as calibration finds it
            tensors[suffixes[1]] = np.full(shape_of_scale, 0.03125 if shape[1] == 64 else 0.0625, np.float32)
        return tensors, numbers.astype(np.float64) * scale.reshape(1, 1).astype(np.float64)

    return quantize


def per_output(shape_of_scale: str = "[N, 1]") -> Quantize:
    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        if module == "lm_head":
            return None
        numbers, scales = random_e4m3(shape, rng), random_scales((shape[0], 1), "float32", rng)
        stored = scales if shape_of_scale == "[N, 1]" else scales[:, 0]
        return {"weight": numbers, "weight_scale": stored}, numbers.astype(np.float64) * scales.astype(np.float64)

    return quantize


def config_of(block: tuple[int, int] | None = None, **changes: Any) -> dict[str, Any]:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "data_type": "something else"}
    return config | ({} if block is None else {"weight_block_size": list(block)}) | changes


def packed(params: Any, name: str) -> QuantizedWeight:
    assert isinstance(params[name], QuantizedWeight)
    return params[name]


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_bit_for_bit(block: tuple[int, int], tmp_path: Path) -> None:
    values = write_quantized(tmp_path, config_of(block), in_blocks(block))
    loaded = load_model(tmp_path)
    require_values(loaded.params, values)
    if block == (16, 24):
        assert not isinstance(loaded.params["layers.0.mlp.down.weight"], QuantizedWeight)
        return
    groups = {(32, 32): (32, 32), (128, 128): (-1, -1), (64, 64): (-1, 32), (48, 16): (16, 16)}[block]
    weights = [packed(loaded.params, f"layers.0.{name}.weight") for name in ("attn.qkv", "mlp.down")]
    assert tuple(weight.group_size for weight in weights) == groups
    assert {weight.kind for weight in weights} == {"w8a8_fp8"}
    assert loaded.quantization is not None and loaded.quantization.startswith("fp8 (w8a8_fp8")


@pytest.mark.parametrize(
    ("dtype", "suffix", "changes"),
    [
        ("bfloat16", "weight_scale_inv", {}),
        ("float16", "weight_scale", {}),
        ("e8m0", "scale", {"scale_fmt": "ue8m0"}),
        ("e8m0", "weight_scale_inv", {}),
    ],
)
def test_dtypes_and_names_of_scales(dtype: str, suffix: str, changes: dict[str, Any], tmp_path: Path) -> None:
    values = write_quantized(tmp_path, config_of((32, 32), **changes), in_blocks((32, 32), dtype, suffix))
    params = load_model(tmp_path).params
    require_values(params, values)
    assert packed(params, "layers.0.attn.o.weight").scales.dtype == ("float32" if dtype == "e8m0" else dtype)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_a_matrix(shape: tuple[int, ...], suffix: str, tmp_path: Path) -> None:
    """Of fused matrices each keeps its own; with dynamic activations a scale that was measured is left aside."""
    quantize = per_tensor(shape, static=True, suffixes=(suffix, "input_scale"))
    values = write_quantized(tmp_path, config_of(), quantize)
    params = load_model(tmp_path).params
    require_values(params, values)
    qkv = packed(params, "layers.0.attn.qkv.weight")
    assert len(set(np.asarray(qkv.scales).ravel().tolist())) == 3
    assert qkv.static is None


@pytest.mark.parametrize("suffixes", [("weight_scale", "input_scale"), ("weight_scale_inv", "activation_scale")])
def test_static_activations(suffixes: tuple[str, str], tmp_path: Path) -> None:
    values = write_quantized(
        tmp_path, config_of(activation_scheme="static", weight_block_size=None), per_tensor((), True, suffixes)
    )
    params = load_model(tmp_path).params
    require_values(params, values)
    down = packed(params, "layers.0.mlp.down.weight")
    assert down.static is not None and float(down.static.scale) == 0.0625
    x = np.random.default_rng(1).normal(size=(4, 96)).astype(np.float32) * 9  # up to 28 and more: beyond the range
    rounded = np.clip(x / 0.0625, -448, 448).astype(E4M3).astype(np.float64) * 0.0625
    found = product(jnp.asarray(x), down, "reference")
    np.testing.assert_allclose(found, rounded @ dense(down).astype(np.float64), rtol=1e-4, atol=1e-3)


def test_static_activations_that_differ(tmp_path: Path) -> None:
    """Matrices that share inputs and have scales of their own for them stay apart."""

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        made = per_tensor((), True)(module, shape, rng)
        if made is not None and "k_proj" in module:
            made[0]["input_scale"] = np.float32([0.5])[0:1].reshape(())
        return made

    values = write_quantized(tmp_path, config_of(activation_scheme="static"), quantize)
    params = load_model(tmp_path).params
    require_values(params, values)
    mixed = params["layers.1.attn.qkv.weight"]
    assert isinstance(mixed, MixedWeight)
    scales = [float(part.static.scale) for part in mixed.parts if isinstance(part, QuantizedWeight) and part.static]
    assert scales == [0.03125, 0.5, 0.03125]


@pytest.mark.parametrize("limit", [None, 2.0])
def test_fbgemm(limit: float | None, tmp_path: Path) -> None:
    """Scales of outputs, and activations that are quantized as if none were beyond a limit."""
    config = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}
    values = write_quantized(tmp_path, config | ({} if limit is None else {"activation_scale_ub": limit}), per_output())
    params = load_model(tmp_path).params
    require_values(params, values)
    down = packed(params, "layers.0.mlp.down.weight")
    assert down.input_limit == (1200.0 if limit is None else limit)
    x = np.random.default_rng(2).normal(size=(5, 96)).astype(np.float32)
    x[0, 3], x[1, 4] = 1500, -7
    numbers, scales = quantize_activations(np.clip(x, -down.input_limit, down.input_limit), E4M3)
    expected = (np.asarray(numbers, np.float64) * np.asarray(scales)) @ dense(down).astype(np.float64)
    for implementation in ("reference", "xla"):
        found = quantized_matmul(jnp.asarray(x), down, implementation=implementation)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("ignored_layers", ["model.layers.0.self_attn.qkv_proj"]),
        (
            "modules_to_not_convert",
            ["lm_head", "layers.0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"],
        ),
        ("ignored_layers", None),
    ],
)
def test_modules_that_are_plain(key: str, names: list[str] | None, tmp_path: Path) -> None:
    """As a list says, under a fused name, by the ends of names, or not at all: what is there decides."""

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        plain = "layers.0.self_attn" in module and "o_proj" not in module
        return None if plain else in_blocks((32, 32))(module, shape, rng)

    values = write_quantized(tmp_path, config_of((32, 32), **{key: names}), quantize)
    params = load_model(tmp_path).params
    require_values(params, values)
    assert not isinstance(params["layers.0.attn.qkv.weight"], QuantizedWeight)
    assert isinstance(params["layers.1.attn.qkv.weight"], QuantizedWeight)


def test_scales_of_a_cache(tmp_path: Path) -> None:
    """Such files hold more than weights."""

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        made = per_tensor()(module, shape, rng)
        if made is not None and module.endswith(("k_proj", "v_proj")):
            made[0][f"{module[-6]}_scale"] = np.float32([0.5])
        return made

    values = write_quantized(tmp_path, config_of(), quantize)
    require_values(load_model(tmp_path).params, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'; it must be e4m3"),
        ({"scale_fmt": "int"}, "quantization_config.scale_fmt is 'int'"),
        ({"activation_scheme": "magic"}, "activation_scheme is 'magic'; it must be dynamic or static"),
        (
            {"activation_scheme": "static"},
            "activation_scheme is 'static'; it must be dynamic where weights have blocks",
        ),
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\]; it must be two positive integers"),
        ({"weight_block_size": [128, 0]}, "two positive integers"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": -1}, "activation_scale_ub is -1"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, config_of((32, 32)) | changes, in_blocks((32, 32)))
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of((32, 16)), r"q_proj.weight_scale_inv is \[2, 2\], expected \[2, 4\]"),
        (config_of(), r"q_proj.weight_scale_inv is \[2, 2\], expected \[\]"),
        (config_of((32, 32), ignored_layers=["model.layers.0"]), "layers.0.*weight is float8_e4m3fn, expected float64"),
        ({"quant_method": "fbgemm_fp8"}, r"weight_scale_inv is \[2, 2\], expected \[64, 1\]"),
    ],
)
def test_tensors_that_contradict_the_config(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, config, in_blocks((32, 32)))
    with pytest.raises(WeightsError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "number", "message"),
    [
        ("weight", np.nan, "q_proj.weight: it holds numbers that are NaN"),
        ("weight_scale", np.inf, "q_proj.weight: its scales hold numbers that are not finite"),
        ("input_scale", 0.0, "q_proj.weight: its activations' scale is 0.0, not a positive number"),
        ("input_scale", None, "q_proj.input_scale is missing"),
    ],
)
def test_damaged(suffix: str, number: float | None, message: str, tmp_path: Path) -> None:
    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        made = per_tensor((), True)(module, shape, rng)
        if made is not None and module == "model.layers.0.self_attn.q_proj":
            if number is None:
                del made[0][suffix]
            else:
                array = made[0][suffix]
                made[0][suffix] = np.where(np.arange(array.size).reshape(array.shape) == 0, number, array).astype(
                    array.dtype
                )
        return made

    write_quantized(tmp_path, config_of(activation_scheme="static"), quantize)
    with pytest.raises(WeightsError, match=message):
        load_model(tmp_path)


def test_converting_is_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", config_of((32, 32)), in_blocks((32, 32)))
    config = EngineConfig.from_flat(model=str(tmp_path / "m"))
    with pytest.raises(UnsupportedModelError, match=r"full-precision weights, .* are quantized: fp8 \(w8a8_fp8"):
        convert_model(config, tmp_path / "out", lambda done, total, what: None)
    assert not (tmp_path / "out").exists()
