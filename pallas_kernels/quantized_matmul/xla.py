"""The product with packed weights as XLA dots.

On a GPU XLA fuses the conversion of weights with one scale per output into its matrix product. On a CPU it never
does: converted weights go to memory and back, several times the bytes of the packed ones. There, integer weights meet
the activations' digits instead (`_by_digits`), on the instructions for products of 8-bit integers. With groups only
large weights do; others, and 8-bit floats, are converted, integers in chunks of outputs if they are too large for the
caches. Conversions from 8-bit floats are slow themselves and gain more from all threads than from caches: a loop's
body has one thread for them (docs/measurements/quantized-matmul-cpu.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import current_device
from pallas_kernels.quantized_matmul.activations import quantize_activations, quantize_by
from pallas_kernels.quantized_matmul.reference import met
from pallas_kernels.quantized_matmul.weight import KINDS, QuantizedWeight, dequantize

CHUNK = 512  # outputs
LEAST_CHUNK = 128  # where N is no multiple of CHUNK
LEAST_CHUNKED = 1 << 22  # numbers of a weight: smaller ones stay in the caches
MOST_ROWS_IN_GROUPS = 32
_NT = (((1,), (1,)), ((), ()))  # [M, K] x [N, K]


def run(x: jax.Array, weight: QuantizedWeight, out_dtype: Any) -> jax.Array:
    """See `api.quantized_matmul`."""
    rows, on_cpu = x.shape[0], current_device().platform == "cpu"
    if rows == 1 and on_cpu:
        # One-row dots of narrow numbers are many times slower (docs/measurements/cpu-dots.md).
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    activations = KINDS[weight.kind].activations
    if activations is None:
        product = _weight_only_on_cpu(x, weight) if on_cpu else _weight_only(x, weight)
    elif weight.group_size < 0:
        product = both(x, weight, activations, partial(_narrow_dot, on_cpu=on_cpu))
    elif on_cpu:
        product = _both_in_groups(x, weight, activations)
    else:  # a loop would stay outside of a CUDA graph
        product = _dot(met(x, weight).astype(x.dtype), dequantize(weight, x.dtype))
    return product[:rows].astype(out_dtype)


def _dot(a: jax.Array, b: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """[M, K] x [N, K]."""
    # Of 8-bit floats "highest" means float32 sums; by default XLA has tensor cores add them in about 14 bits.
    narrow = a.dtype == b.dtype == jnp.float8_e4m3fn
    precision = lax.Precision.HIGHEST if narrow else None
    return lax.dot_general(a, b, _NT, precision=precision, preferred_element_type=dtype)


def _weight_only(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """float32[M, N]; a scale per output stays outside of the sum, so the weights need nothing but a conversion."""
    if weight.group_size > 0 or weight.zero_points is not None or weight.offsets is not None:
        return _dot(x, dequantize(weight, x.dtype))
    return _dot(x, weight.stored.astype(x.dtype)) * weight.scales[0].astype(jnp.float32)


def _weight_only_on_cpu(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """float32[M, N]; see `_by_digits`, which with groups pays for few rows of large weights only."""
    integers = jnp.issubdtype(weight.stored.dtype, jnp.integer)
    pays = x.shape[0] <= MOST_ROWS_IN_GROUPS and weight.n * weight.k >= LEAST_CHUNKED
    if integers and (weight.group_size < 0 or pays):
        return _by_digits(x, weight)
    x, stored = _after(x, weight.stored)
    return _in_chunks(x, replace(weight, stored=stored))


def _after(x: jax.Array, stored: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same arrays, of which neither is there before the other. Without this XLA converts the weights of all layers
    before it runs the first, and has all of them in memory.
    """
    return lax.optimization_barrier((x, stored))


def _by_digits(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """float32[M, N] by dots of integers alone, so that weights are never converted to floats.

    Each token is written in fixed point, in units of its largest magnitude over `127 * (256^d - 1) / 255`, with d
    digits in -128 .. 127: two for 16-bit activations, three for float32. That is as exact as the activations' own dtype
    where they are largest. Digits are more rows of one product, whose sums of integers are exact: a token's result
    does not depend on the rows beside it.
    """
    count = 2 if x.dtype.itemsize == 2 else 3
    wide = x.astype(jnp.float32)
    limit = 127 * (256**count - 1) // 255
    unit = jnp.abs(wide).max(-1, keepdims=True) * (1.0 / limit)
    # The largest number itself may come out a little larger than the limit, which no digits can hold.
    rest = jnp.clip(jnp.round(wide * (1.0 / jnp.where(unit == 0, 1.0, unit))), -limit, limit).astype(jnp.int32)
    digits = []  # the lowest first
    for _ in range(count):
        digit = ((rest + 128) & 255) - 128
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) >> 8
    stacked = jnp.concatenate(digits)
    if weight.group_size < 0:
        return _digits_of_group(stacked, weight.stored, weight, 0, count) * unit
    size = weight.group_size

    def add(g: jax.Array, total: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(stacked, g * size, size, 1)
        packed = lax.dynamic_slice_in_dim(weight.stored, g * size, size, 1)
        return total + _digits_of_group(part, packed, weight, g, count)

    return lax.fori_loop(0, weight.k // size, add, jnp.zeros((x.shape[0], weight.n), jnp.float32)) * unit


def _digits_of_group(
    stacked: jax.Array, packed: jax.Array, weight: QuantizedWeight, group: jax.Array | int, count: int
) -> jax.Array:
    """float32[M, N] in units of the tokens: the product of `count` digits int8[count * M, K] with [N, K], scaled."""
    sums = _dot(stacked, packed.astype(jnp.int8), jnp.int32)
    of_inputs = stacked.astype(jnp.int32).sum(-1, keepdims=True)  # for what is added to all weights of an output
    if weight.zero_points is not None:
        sums = sums - of_inputs * weight.zero_points[group].astype(jnp.int32)
    total = _from_digits(sums, count) * weight.scales[group].astype(jnp.float32)
    if weight.offsets is None:
        return total
    return total + _from_digits(of_inputs, count) * weight.offsets[group].astype(jnp.float32)


def _from_digits(sums: jax.Array, count: int) -> jax.Array:
    """float32[M, ...] of int32[count * M, ...], the lowest digit first."""
    total = jnp.zeros((sums.shape[0] // count, *sums.shape[1:]), jnp.float32)
    for digit in reversed(jnp.split(sums, count)):
        total = total * 256 + digit.astype(jnp.float32)
    return total


def _in_chunks(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """The same, some outputs at a time if that pays."""
    chunk = chunk_of(weight)
    if chunk == weight.n:
        return _weight_only(x, weight)

    def multiply(index: jax.Array, out: jax.Array) -> jax.Array:
        first = index * chunk

        def outputs(rows: jax.Array | None) -> jax.Array | None:
            return None if rows is None else lax.dynamic_slice_in_dim(rows, first, chunk, 1)

        part = replace(
            weight,
            stored=lax.dynamic_slice_in_dim(weight.stored, first, chunk, 0),
            scales=outputs(weight.scales),
            zero_points=outputs(weight.zero_points),
            offsets=outputs(weight.offsets),
        )
        return lax.dynamic_update_slice_in_dim(out, _weight_only(x, part), first, 1)

    return lax.fori_loop(0, weight.n // chunk, multiply, jnp.zeros((x.shape[0], weight.n), jnp.float32))


def chunk_of(weight: QuantizedWeight) -> int:
    """Outputs to convert and multiply at a time on a CPU."""
    chunk = math.gcd(weight.n, CHUNK)
    pays = jnp.issubdtype(weight.stored.dtype, jnp.integer) and weight.n * weight.k >= LEAST_CHUNKED
    return chunk if pays and chunk >= LEAST_CHUNK else weight.n


def both(
    x: jax.Array, weight: QuantizedWeight, dtype: str, dot: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """float32[M, N] of quantized activations, one scale per token (or for all of them) and one per output.

    Args:
        dot: float32 sums of numbers, [M, K] x [N, K].
    """
    static = weight.static
    stored, scales = quantize_activations(x, dtype) if static is None else quantize_by(x, dtype, static)
    sums = dot(stored, weight.stored)
    if static is not None and static.zero_point is not None and static.sums is not None:
        sums = sums - (static.zero_point * static.sums).astype(jnp.float32)
    return sums * scales * weight.scales[0].astype(jnp.float32)


def _both_in_groups(x: jax.Array, weight: QuantizedWeight, dtype: str) -> jax.Array:
    """float32[M, N] of activations with a scale per token and group: each group's product, scaled and added."""
    numbers, scales = quantize_activations(x, dtype, weight.group_size)
    packed = weight.stored
    if not jnp.issubdtype(packed.dtype, jnp.integer):
        numbers, packed = _after(numbers, packed)
        packed = packed.astype(jnp.bfloat16)  # here by all threads, in the loop by one

    def add(g: jax.Array, total: jax.Array) -> jax.Array:
        start = g * weight.group_size
        a = lax.dynamic_slice_in_dim(numbers, start, weight.group_size, 1)
        b = lax.dynamic_slice_in_dim(packed, start, weight.group_size, 1)
        return total + _narrow_dot(a, b, True) * (scales[:, g, None] * weight.scales[g].astype(jnp.float32))

    return lax.fori_loop(0, scales.shape[1], add, jnp.zeros((x.shape[0], weight.n), jnp.float32))


def _narrow_dot(a: jax.Array, b: jax.Array, on_cpu: bool) -> jax.Array:
    """float32 [M, K] x [N, K] of 8-bit numbers, summed in int32 if they are integers."""
    if jnp.issubdtype(a.dtype, jnp.integer):
        return _dot(a, b, jnp.int32).astype(jnp.float32)
    if on_cpu:  # no dots of 8-bit floats there; bfloat16 holds each of them exactly
        a, b = _after(a, b)
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return _dot(a, b)
