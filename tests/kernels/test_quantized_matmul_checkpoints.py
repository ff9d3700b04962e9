"""What packed weights of checkpoints may have beside scales: offsets, an order of inputs, scales of activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.quantized_matmul import (
    QuantizedWeight,
    dequantize,
    quantized_matmul,
    repack,
    with_static_activations,
    xla,
)
from pallas_kernels.quantized_matmul.pallas_mosaic_gpu import supports
from pallas_kernels.quantized_matmul.problem import problem_of

call = jax.jit(quantized_matmul, static_argnames=("out_dtype", "implementation"))
IMPLEMENTATIONS = ("reference", "xla")
needs_compiler = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
needs_integers = pytest.mark.skipif(
    native.unavailable() is not None or not native.has_integer_dots(), reason="no native dots of integers"
)
WITH_NATIVE = (*IMPLEMENTATIONS, pytest.param("native_cpu", marks=needs_compiler))
K, N = 128, 48


def make(kind: str, group_size: int, *, offsets: bool = False, seed: int = 0) -> tuple[QuantizedWeight, np.ndarray]:
    """Random packed weights, and their values [K, N] by numpy."""
    rng = np.random.default_rng(seed)
    bound = 7 if kind == "w4a16" else 100
    stored = rng.integers(-bound, bound + 1, (N, K))
    groups = 1 if group_size < 0 else K // group_size
    scales = (rng.uniform(0.5, 1.5, (N, groups)) / bound).astype(np.float32)
    moved = rng.uniform(-1, 1, (N, groups)).astype(np.float32) if offsets else np.zeros((N, groups), np.float32)
    weight = repack(
        jnp.asarray(stored),
        jnp.asarray(scales),
        kind=kind,
        group_size=group_size,
        offsets=jnp.asarray(moved) if offsets else None,
    )
    size = K // groups
    return weight, (stored * np.repeat(scales, size, 1) + np.repeat(moved, size, 1)).T


def activations(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, K)).astype(np.float32)


def require_close(found: Any, expected: np.ndarray, tolerance: float = 3e-6) -> None:
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("implementation", WITH_NATIVE)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(("kind", "group_size"), [("w4a16", 32), ("w8a16", -1), ("w4a16", 16)])
def test_offsets(kind: str, group_size: int, rows: int, implementation: str) -> None:
    weight, values = make(kind, group_size, offsets=True)
    require_close(dequantize(weight).T, values, 1e-6)
    x = activations(rows)
    require_close(call(x, weight, implementation=implementation), x @ values)
    dropped = replace(weight, offsets=None)
    assert np.abs(call(x, dropped, implementation=implementation) - x @ values).max() > 0.1


def test_offsets_by_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What large weights take on a CPU, in groups and in chunks."""
    weight, values = make("w4a16", 32, offsets=True)
    x = activations(3)
    require_close(jax.jit(xla._by_digits)(x, weight), x @ values)
    monkeypatch.setattr(xla, "LEAST_CHUNKED", 0)
    monkeypatch.setattr(xla, "CHUNK", 16)
    monkeypatch.setattr(xla, "LEAST_CHUNK", 16)
    assert xla.chunk_of(weight) == 16
    require_close(jax.jit(xla._in_chunks)(x, weight), x @ values)


@pytest.mark.parametrize("implementation", WITH_NATIVE)
def test_order_of_inputs(implementation: str) -> None:
    weight, values = make("w4a16", 32)
    order = np.random.default_rng(1).permutation(K)
    ordered = replace(weight, input_order=jnp.asarray(order, jnp.int32))
    in_order = np.empty_like(values)
    in_order[order] = values  # row k of the packed matrix is that of activation order[k]
    x = activations(4)
    require_close(dequantize(ordered).T, in_order, 1e-6)
    require_close(call(x, ordered, implementation=implementation), x @ in_order)


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, pytest.param("native_cpu", marks=needs_integers)))
@pytest.mark.parametrize("zero_point", [None, 0, -37])
def test_static_integers(zero_point: int | None, implementation: str) -> None:
    weight, values = make("w8a8", -1)
    scale = np.float32(0.011)  # some numbers lie beyond the range
    zero = None if zero_point is None else jnp.asarray([zero_point], jnp.int8)[0]
    packed = with_static_activations(weight, jnp.asarray(scale), zero)
    x = activations(6)
    numbers = np.clip(np.rint(x / scale + np.float32(zero_point or 0)), -128, 127)
    expected = (numbers - (zero_point or 0)) * scale @ values
    assert (np.abs(numbers) == 127).any() or (numbers == -128).any()
    require_close(call(x, packed, implementation=implementation), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_static_floats(implementation: str) -> None:
    rng = np.random.default_rng(5)
    stored = rng.uniform(-448, 448, (N, K)).astype(jnp.float8_e4m3fn)
    weight = repack(jnp.asarray(stored), jnp.asarray([0.01], jnp.float32), kind="w8a8_fp8")
    scale = np.float32(0.004)
    x = activations(3)
    numbers = np.clip(x / scale, -448, 448).astype(jnp.float8_e4m3fn).astype(np.float32)
    packed = with_static_activations(weight, jnp.asarray(scale), None)
    require_close(
        call(x, packed, implementation=implementation), numbers * scale @ (stored.astype(np.float32).T * 0.01)
    )


def test_refusals() -> None:
    grouped, _ = make("w4a16", 32)
    with pytest.raises(ValueError, match="no static scale"):
        with_static_activations(grouped, jnp.ones(()), None)
    floats = repack(jnp.ones((N, K)), jnp.ones((), jnp.float32), kind="w8a8_fp8")
    with pytest.raises(ValueError, match="no zero point"):
        with_static_activations(floats, jnp.ones(()), jnp.ones((), jnp.int8))
    with pytest.raises(ValueError, match="no zero points and offsets"):
        repack(jnp.ones((N, K)), jnp.ones((), jnp.float32), kind="w8a8", offsets=jnp.ones((), jnp.float32))


def test_what_the_kernel_leaves_to_xla() -> None:
    x = jnp.ones((4, K), jnp.bfloat16)
    offsets, _ = make("w4a16", 32, offsets=True)
    integers, _ = make("w8a8", -1)
    static = with_static_activations(integers, jnp.ones(()), None)
    small, _ = make("w4a16", 16)
    for weight, reason in ((offsets, "offsets"), (static, "known beforehand"), (small, "groups of 16")):
        wide = replace(weight, stored=jnp.tile(weight.stored, (8, 1)))  # whose sizes fit
        assert reason in (supports(problem_of(x, wide)) or "")


@pytest.mark.parametrize("kind", ["w4a16", "w8a16"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_what_auto_takes_is_right(rows: int, kind: str) -> None:
    """Groups of 16, offsets and an order of inputs, whatever runs them here."""
    x = activations(rows)
    for offsets in (False, True):
        weight, values = make(kind, 16, offsets=offsets)
        require_close(call(x, weight), x @ values, 1e-5)
        order = np.random.default_rng(1).permutation(K)
        in_order = np.empty_like(values)
        in_order[order] = values
        ordered = replace(weight, input_order=jnp.asarray(order, jnp.int32))
        require_close(call(x, ordered), x @ in_order, 1e-5)
