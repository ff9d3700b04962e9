"""8-bit floats of 4 bits of exponent and 3 of mantissa (Micikevicius et al. 2022, arXiv 2209.05433): rounding to them
without XLA's conversions, which run one number at a time on a CPU; and scales that lose least.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LARGEST = 448.0
_LEAST_NORMAL = 2.0**-6
_LEAST_STEP = 2.0**-9


def nearest(numbers: jax.Array) -> jax.Array:
    """float32 numbers of magnitude at most 448, rounded to e4m3 and back, bit for bit."""
    subnormal = jnp.round(numbers * (1 / _LEAST_STEP)) * _LEAST_STEP
    return jnp.where(jnp.abs(numbers) < _LEAST_NORMAL, subnormal, _three_bits(numbers))


def _three_bits(numbers: jax.Array) -> jax.Array:
    """float32 with 3 bits of mantissa and any exponent."""
    return lax.reduce_precision(numbers, exponent_bits=8, mantissa_bits=3)


def least_error_scales(
    blocks: jax.Array, scale: jax.Array, importance: jax.Array | None, dtype: Any, count: int
) -> jax.Array:
    """Scales with which blocks lose least when they are rounded, of `count` within an octave above the least that there
    is room for. More than an octave would repeat what there was: the grid is that of floats.

    Args:
        blocks: float32[..., R, r, G, g]; the numbers of [..., R, :, G, :] share a scale.
        scale: float32[..., R, G], the largest magnitude over 448.
        importance: float32[G, g], of the squared errors of each input; None = all alike.
        dtype: of the scales.
        count: of candidates.

    Returns:
        [..., R, G] in `dtype`.
    """
    factors = jnp.asarray(2.0 ** (np.arange(count) / count), jnp.float32)

    def candidate(index: jax.Array | int) -> jax.Array:
        return (scale * factors[index]).astype(dtype)

    def loss(rounded: jax.Array) -> jax.Array:
        step = rounded.astype(jnp.float32)[..., :, None, :, None]
        # Subnormal numbers, under 1/28,672 of the largest, are taken to have 3 bits too.
        error = _three_bits(blocks * (1.0 / jnp.where(step == 0, 1.0, step))) * step - blocks
        squared = error * error
        return (squared if importance is None else squared * importance).sum((-3, -1))

    def compare(index: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chosen, least = best
        other = candidate(index)
        found = loss(other)
        return jnp.where(found < least, other, chosen), jnp.minimum(found, least)

    first = candidate(0)
    return lax.fori_loop(1, count, compare, (first, loss(first)))[0]
