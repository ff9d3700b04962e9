"""The row-wise passes in C++ (`native/rowwise.cc`): one pass each, in the width of the processor's vectors.

A row's result is the same bits whatever rows are beside it. Nothing differentiates it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.device import Device
from pallas_kernels.rowwise.problem import Heads, RowwiseProblem

DTYPES = ("float32", "bfloat16", "float16")
NATIVE_ACTIVATIONS = ("silu", "gelu_tanh")


def device_reason(device: Device) -> str | None:
    """None if the device is a CPU, or why not."""
    return None if device.platform == "cpu" else f"needs a CPU, this is {device.platform}"


def supports(problem: RowwiseProblem) -> str | None:
    """None, or the reason why it cannot run the problem."""
    if problem.dtype not in DTYPES:
        return f"rows are {problem.dtype}, not float32, bfloat16 or float16"
    if problem.activation is not None and problem.activation not in NATIVE_ACTIVATIONS:
        return f"the activation is {problem.activation}, not {' or '.join(NATIVE_ACTIVATIONS)}"
    return native.unavailable()


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """See `api.norm`."""
    rows = x.reshape(-1, x.shape[-1])
    return _norm(rows, jnp.zeros((0,), x.dtype), weight, eps)[0].reshape(x.shape)


def add_norm(x: jax.Array, residual: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """See `api.add_norm`."""
    normed, total = _norm(x, residual, weight, eps)
    return normed, total


def _norm(x: jax.Array, residual: jax.Array, weight: jax.Array, eps: float) -> Sequence[jax.Array]:
    shapes = [jax.ShapeDtypeStruct(shape, x.dtype) for shape in (x.shape, residual.shape)]
    call = jax.ffi.ffi_call("quire_rms_norm", shapes)
    return call(x, residual, weight.astype(x.dtype), eps=np.float32(eps))


def gate(gate_up: jax.Array, activation: str) -> jax.Array:
    """See `api.gate`."""
    shape = jax.ShapeDtypeStruct((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)
    return jax.ffi.ffi_call("quire_gate", shape)(gate_up, activation=np.int64(NATIVE_ACTIVATIONS.index(activation)))


def turns(angles: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """See `api.turns`."""
    shape = jax.ShapeDtypeStruct((angles.shape[0], 2 * angles.shape[1]), jnp.float32)
    cos, sin = jax.ffi.ffi_call("quire_turns", [shape, shape])(angles, scale=np.float32(scale))
    return cos, sin


def heads(
    qkv: jax.Array,
    layout: Heads,
    turned: tuple[jax.Array, jax.Array] | None,
    norms: tuple[jax.Array, jax.Array] | None,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.heads`."""
    rows = qkv.shape[0]
    shapes = [
        jax.ShapeDtypeStruct((rows, count, layout.dim), qkv.dtype)
        for count in (layout.num_q, layout.num_kv, layout.num_kv)
    ]
    none = jnp.zeros((rows, 0), jnp.float32)
    cos, sin = (none, none) if turned is None else turned
    weights = [jnp.zeros((0,), qkv.dtype)] * 2 if norms is None else [weight.astype(qkv.dtype) for weight in norms]
    q, k, v = jax.ffi.ffi_call("quire_heads", shapes)(qkv, cos, sin, *weights, eps=np.float32(eps))
    return q, k, v


FUNCTIONS = {"norm": norm, "add_norm": add_norm, "gate": gate, "turns": turns, "heads": heads}
