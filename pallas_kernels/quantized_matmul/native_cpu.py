"""The product with packed weights in C++: each weight is read from memory once, packed.

Integers with one scale per output meet bfloat16 activations as integers, if the processor has dots of them
(`native/integers.cc`): a token is written in fixed point, with two digits of 8 bits, and sums are exact up to 4096
inputs. Kinds that round activations to integers have one digit, and exact sums.

Elsewhere (`native/product.cc`) a result is the sum of products of the activations with bfloat16 numbers (float32 for
float32 activations): the stored numbers themselves, less their zero points, where an output has one scale, which
multiplies the sum; with groups or offsets, the weights' values, rounded to the activations' dtype as they are on every
other device. The order of additions depends on nothing but the number of inputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.device import Device
from pallas_kernels.quantized_matmul import e4m3
from pallas_kernels.quantized_matmul.activations import quantize_activations
from pallas_kernels.quantized_matmul.problem import QuantizedMatmulProblem
from pallas_kernels.quantized_matmul.weight import KINDS, Kind, QuantizedWeight
from pallas_kernels.quantized_matmul.xla import both

PADDED = 32  # rows of activations are padded to a multiple of it
MOST_ROWS_WITHOUT_DOTS = 16
MOST_ROWS_OF_INTEGERS = 512
MOST_INPUTS_OF_INTEGERS = 1 << 16  # of which sums of any weights and activations fit in 32 bits


def device_reason(device: Device) -> str | None:
    """None if the device is a CPU, or why not."""
    return None if device.platform == "cpu" else f"needs a CPU, this is {device.platform}"


def supports(problem: QuantizedMatmulProblem) -> str | None:
    """None, or the reason why it cannot run the problem."""
    integers = _of_integers(problem.rule, problem.group_size)
    if integers and not native.unavailable() and not native.has_integer_dots():
        return "8-bit integers on both sides, on a processor without AVX-512's dots of them"
    if integers and problem.k > MOST_INPUTS_OF_INTEGERS:
        return f"{problem.k} inputs of 8-bit integers on both sides, more than {MOST_INPUTS_OF_INTEGERS}"
    if problem.static_activations and not integers:
        return "activations quantized by a scale known beforehand"
    if problem.dtype not in ("float32", "bfloat16", "float16"):
        return f"activations are {problem.dtype}, not float32, bfloat16 or float16"
    if problem.rule.bits == 4 and problem.k % 2:
        return f"an output's {problem.k} weights of 4 bits end inside a byte"
    return native.unavailable()


def yields(problem: QuantizedMatmulProblem, device: Device) -> str | None:
    """None, or the reason why "auto" passes it over: without AVX-512's dots of bfloat16 XLA is faster with many rows,
    and as fast with integers that have one scale per output (docs/measurements/quantized-matmul-cpu.md).
    """
    del device
    if _of_integers(problem.rule, problem.group_size):
        many = problem.m > MOST_ROWS_OF_INTEGERS
        return f"{problem.m} rows of 8-bit integers on both sides, more than {MOST_ROWS_OF_INTEGERS}" if many else None
    if native.has_bfloat16_dots():
        return None
    if problem.m > MOST_ROWS_WITHOUT_DOTS:
        return f"{problem.m} rows, on a processor without AVX-512's dots of bfloat16"
    if problem.rule.dtype == "int8" and problem.group_size < 0:
        return "8-bit integers without groups, on a processor without AVX-512's dots of bfloat16"
    return None


def run(x: jax.Array, weight: QuantizedWeight, out_dtype: Any) -> jax.Array:
    """See `api.quantized_matmul`."""
    dtype = KINDS[weight.kind].activations
    if dtype is None:
        return _integers(x, weight, out_dtype, 2) if _in_digits(x, weight) else _product(x, weight, out_dtype)
    if _of_integers(KINDS[weight.kind], weight.group_size):
        if weight.static is None:
            return _integers(x, weight, out_dtype, 1)
        return both(x, weight, dtype, _sums_of_integers).astype(out_dtype)
    if dtype == "int8":
        numbers, scales = quantize_activations(x, dtype, weight.group_size)
        numbers = numbers.astype(jnp.float32)
    else:
        numbers, scales = _as_fp8(x, weight.group_size)
    if weight.group_size < 0:  # bfloat16 holds each number exactly
        return (_product(numbers.astype(jnp.bfloat16), weight, jnp.float32) * scales).astype(out_dtype)
    met = numbers.reshape(*scales.shape, -1) * scales[..., None]
    return _product(met.reshape(x.shape).astype(x.dtype), weight, out_dtype)


def _of_integers(rule: Kind, group_size: int) -> bool:
    return rule.activations == "int8" and group_size < 0


def _in_digits(x: jax.Array, weight: QuantizedWeight) -> bool:
    """Whether the weights meet the activations' digits: with float32 activations a product would need three."""
    whole = weight.group_size < 0 and weight.offsets is None and jnp.issubdtype(weight.stored.dtype, jnp.integer)
    return whole and x.dtype == jnp.bfloat16 and weight.k <= MOST_INPUTS_OF_INTEGERS and native.has_integer_dots()


def _integers(x: jax.Array, weight: QuantizedWeight, out_dtype: Any, digits: int) -> jax.Array:
    """[M, N]; one digit is `quantize_activations`, bit for bit."""
    x = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    return _integer_product(x, weight.stored, weight.scales[0], weight.zero_points, out_dtype, digits)


def _sums_of_integers(x: jax.Array, stored: jax.Array) -> jax.Array:
    """float32[M, N] of int8[M, K] and int8[N, K], summed exactly."""
    return _integer_product(x, stored, jnp.zeros(0, jnp.float32), None, jnp.float32, 1)


def _integer_product(
    x: jax.Array, stored: jax.Array, scales: jax.Array, zero_points: jax.Array | None, out_dtype: Any, digits: int
) -> jax.Array:
    """[M, N] of x, bfloat16, float32 or int8 [M, K], and integers [N, K]; `scales` may be empty, which means 1."""
    zeros = jnp.zeros(0, jnp.int8) if zero_points is None else zero_points
    shape = jax.ShapeDtypeStruct((x.shape[0], stored.shape[0]), _direct(out_dtype))
    found = jax.ffi.ffi_call("quire_integer_product", shape)(x, stored, scales, zeros, digits=np.int64(digits))
    return found.astype(out_dtype)


def _direct(out_dtype: Any) -> Any:
    """The dtype that a kernel writes for it."""
    return jnp.dtype(out_dtype) if out_dtype in (jnp.float32, jnp.bfloat16) else jnp.dtype(jnp.float32)


def _product(x: jax.Array, weight: QuantizedWeight, out_dtype: Any) -> jax.Array:
    """[M, N]; x is what the weights meet."""
    if x.dtype != jnp.bfloat16 or not native.has_bfloat16_dots():
        x = x.astype(jnp.float32)
    x = jnp.pad(x, ((0, 0), (0, -weight.k % PADDED)))
    zeros = jnp.zeros(0, jnp.int8) if weight.zero_points is None else weight.zero_points
    offsets = jnp.zeros(0, weight.scales.dtype) if weight.offsets is None else weight.offsets
    scales = weight.scales
    if offsets.dtype != scales.dtype:
        scales, offsets = scales.astype(jnp.float32), offsets.astype(jnp.float32)
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.n), _direct(out_dtype))
    return jax.ffi.ffi_call("quire_packed_product", shape)(x, weight.stored, scales, zeros, offsets).astype(out_dtype)


def _as_fp8(x: jax.Array, group_size: int) -> tuple[jax.Array, jax.Array]:
    """`quantize_activations` to e4m3, bit for bit, with the numbers as float32."""
    rows, k = x.shape
    wide = x.astype(jnp.float32).reshape(rows, -1, k if group_size < 0 else group_size)
    scales = jnp.abs(wide).max(-1) / e4m3.LARGEST
    numbers = jnp.clip(wide / jnp.where(scales == 0, 1.0, scales)[..., None], -e4m3.LARGEST, e4m3.LARGEST)
    return e4m3.nearest(numbers).reshape(rows, k), scales
