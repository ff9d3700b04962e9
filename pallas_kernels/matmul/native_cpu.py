"""The matrix product in C++ (`native/dense.cc`): weights are read where they lie, once, at the speed of memory.

The order of additions depends on nothing but the number of inputs: a row's result is the same bits whatever rows are
beside it. Nothing differentiates it: training writes its products with XLA's own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import native
from pallas_kernels.device import Device
from pallas_kernels.matmul.problem import MatmulProblem

MOST_ROWS = 256  # of bfloat16, for "auto"
PADDED = 32  # rows of activations are padded to a multiple of it
DTYPES = ("float32", "bfloat16", "float16")


def device_reason(device: Device) -> str | None:
    """None if the device is a CPU, or why not."""
    return None if device.platform == "cpu" else f"needs a CPU, this is {device.platform}"


def supports(problem: MatmulProblem) -> str | None:
    """None, or the reason why it cannot run the problem."""
    for dtype in (problem.dtype, problem.weight_dtype):
        if dtype not in DTYPES:
            return f"operands are {dtype}, not float32, bfloat16 or float16"
    if 0 in (problem.m, problem.k, problem.n):
        return "an operand is empty"
    return native.unavailable()


def yields(problem: MatmulProblem, device: Device) -> str | None:
    """None, or the reason why "auto" passes it over: XLA is as fast or faster there (docs/measurements/cpu-dots.md)."""
    del device
    if problem.dtype == problem.weight_dtype == "float16":
        return None  # which XLA multiplies one number at a time
    if problem.dtype != "bfloat16" or problem.weight_dtype != "bfloat16":
        return "XLA reads float32 at the speed of memory"
    if not native.has_bfloat16_dots():
        return "a processor without AVX-512's dots of bfloat16"
    if problem.m > MOST_ROWS:
        return f"{problem.m} rows, more than {MOST_ROWS}"
    return None


def run(x: jax.Array, weight: jax.Array, transposed: bool, out_dtype: Any) -> jax.Array:
    """See `api.matmul`."""
    k, n = weight.shape[::-1] if transposed else weight.shape
    if x.dtype != jnp.bfloat16 or weight.dtype != jnp.bfloat16 or not native.has_bfloat16_dots():
        x = x.astype(jnp.float32)
    x = jnp.pad(x, ((0, 0), (0, -k % PADDED)))
    direct = jnp.dtype(out_dtype) if out_dtype in (jnp.float32, jnp.bfloat16) else jnp.dtype(jnp.float32)
    shape = jax.ShapeDtypeStruct((x.shape[0], n), direct)
    return jax.ffi.ffi_call("quire_dense_product", shape)(x, weight, by_rows=transposed).astype(out_dtype)
