"""Activations quantized at run time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.weight import StaticActivations


def quantize_activations(x: jax.Array, dtype: Any, group_size: int = -1) -> tuple[jax.Array, jax.Array]:
    """Symmetric quantization per token, or per token and group of inputs.

    Args:
        x: [M, K].
        dtype: int8 (rounded half to even) or float8_e4m3fn.
        group_size: inputs that share a scale; -1 = all K.

    Returns:
        stored [M, K] and scales float32[M, G]: `x = stored * scale`; a group of zeros has scale 0.
    """
    rows, k = x.shape
    wide = x.astype(jnp.float32).reshape(rows, -1, k if group_size < 0 else group_size)
    is_int = jnp.issubdtype(dtype, jnp.integer)
    limit = float(jnp.iinfo(dtype).max if is_int else jnp.finfo(dtype).max)
    scales = jnp.abs(wide).max(-1) / limit
    numbers = wide / jnp.where(scales == 0, 1.0, scales)[..., None]
    numbers = jnp.clip(jnp.round(numbers) if is_int else numbers, -limit, limit)
    return numbers.reshape(rows, k).astype(dtype), scales


def quantize_by(x: jax.Array, dtype: Any, static: StaticActivations) -> tuple[jax.Array, jax.Array]:
    """Quantization by a scale, and maybe a zero point, known beforehand.

    Args:
        x: [M, K].
        dtype: int8 (rounded half to even) or float8_e4m3fn; what lies beyond its range becomes its end.
        static: the scale.

    Returns:
        stored [M, K] and scales float32[M, 1]: `x = (stored - zero_point) * scale`.
    """
    numbers = x.astype(jnp.float32) / static.scale
    if jnp.issubdtype(dtype, jnp.integer):
        zero = 0.0 if static.zero_point is None else static.zero_point.astype(jnp.float32)
        numbers = jnp.clip(jnp.round(numbers + zero), float(jnp.iinfo(dtype).min), float(jnp.iinfo(dtype).max))
    else:
        limit = float(jnp.finfo(dtype).max)
        numbers = jnp.clip(numbers, -limit, limit)
    return numbers.astype(dtype), jnp.broadcast_to(static.scale, (x.shape[0], 1))
