"""The product with packed weights as XLA dots."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import current_device
from pallas_kernels.quantized_matmul.activations import quantize_activations
from pallas_kernels.quantized_matmul.weight import KINDS, QuantizedWeight, dequantize

_NT = (((1,), (1,)), ((), ()))  # [M, K] x [N, K]


def run(x: jax.Array, weight: QuantizedWeight, out_dtype: Any) -> jax.Array:
    """See `api.quantized_matmul`."""
    rows = x.shape[0]
    if rows == 1 and current_device().platform == "cpu":
        x = jnp.concatenate(
            [x, jnp.zeros_like(x)]
        )  # one-row dots are many times slower (docs/measurements/cpu-dots.md)
    activations = KINDS[weight.kind].activations
    if activations is None:
        product = _weight_only(x, weight)
    elif weight.group_size < 0:
        product = _both(x, weight, activations)
    else:
        product = _both_in_groups(x, weight, activations)
    return product[:rows].astype(out_dtype)


def _weight_only(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """float32[M, N]; a scale per output stays outside of the sum, so the weights need nothing but a conversion."""
    if weight.group_size > 0 or weight.zero_points is not None:
        return lax.dot_general(x, dequantize(weight, x.dtype), _NT, preferred_element_type=jnp.float32)
    product = lax.dot_general(x, weight.stored.astype(x.dtype), _NT, preferred_element_type=jnp.float32)
    return product * weight.scales[0].astype(jnp.float32)


def _both(x: jax.Array, weight: QuantizedWeight, dtype: str) -> jax.Array:
    """float32[M, N] of quantized activations, one scale per token and one per output."""
    stored, scales = quantize_activations(x, dtype)
    product = _narrow_dot(stored, weight.stored)
    return product.astype(jnp.float32) * scales * weight.scales[0].astype(jnp.float32)


def _both_in_groups(x: jax.Array, weight: QuantizedWeight, dtype: str) -> jax.Array:
    """float32[M, N] of activations with a scale per token and group: each group's product, scaled and added."""
    stored, scales = quantize_activations(x, dtype, weight.group_size)
    groups = scales.shape[1]

    def add(g: jax.Array, total: jax.Array) -> jax.Array:
        start = g * weight.group_size
        a = lax.dynamic_slice_in_dim(stored, start, weight.group_size, 1)
        b = lax.dynamic_slice_in_dim(weight.stored, start, weight.group_size, 1)
        factor = scales[:, g, None] * weight.scales[g].astype(jnp.float32)
        return total + _narrow_dot(a, b).astype(jnp.float32) * factor

    return lax.fori_loop(0, groups, add, jnp.zeros((x.shape[0], weight.n), jnp.float32))


def _narrow_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """[M, K] x [N, K] of 8-bit numbers: int32 of integers, float32 of floats."""
    if jnp.issubdtype(a.dtype, jnp.integer):
        return lax.dot_general(a, b, _NT, preferred_element_type=jnp.int32)
    if current_device().platform == "cpu":  # no dots of 8-bit floats there; bfloat16 holds each of them exactly
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return lax.dot_general(a, b, _NT, preferred_element_type=jnp.float32)
