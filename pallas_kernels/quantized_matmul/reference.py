"""The specification of the product with packed weights: float32 throughout, rounded once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.activations import quantize_activations, quantize_by
from pallas_kernels.quantized_matmul.weight import KINDS, QuantizedWeight, dequantize


def run(x: jax.Array, weight: QuantizedWeight, out_dtype: Any) -> jax.Array:
    """See `api.quantized_matmul`."""
    return jnp.matmul(met(x, weight), dequantize(weight).T, precision="highest").astype(out_dtype)


def met(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """float32[M, K]: the activations as the kind's weights meet them, quantized and back if it quantizes them."""
    dtype = KINDS[weight.kind].activations
    if dtype is None:
        return x.astype(jnp.float32)
    if weight.static is not None:
        stored, scales = quantize_by(x, dtype, weight.static)
        zero = 0.0 if weight.static.zero_point is None else weight.static.zero_point.astype(jnp.float32)
        return (stored.astype(jnp.float32) - zero) * scales
    stored, scales = quantize_activations(x, dtype, weight.group_size)
    wide = stored.astype(jnp.float32).reshape(*scales.shape, -1) * scales[..., None]
    return wide.reshape(x.shape)
