"""Scales and zero points of groups, and rounding to them. Shapes: N outputs, G groups of g inputs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.quantizer.types import FP8_BLOCK, QuantizedMatrix
from pallas_kernels.quantized_matmul import e4m3

SHRINKS = tuple(float(factor) for factor in np.linspace(1.0, 0.6, 17))  # of a group's range, that a search tries


def grouped(matrix: jax.Array, group_size: int) -> jax.Array:
    """[N, K] -> [N, G, g]."""
    n, k = matrix.shape
    return matrix.reshape(n, 1, k) if group_size < 0 else matrix.reshape(n, k // group_size, group_size)


def range_of(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Least and largest number [N, G] of each group [N, G, g], 0 counted in."""
    return jnp.minimum(groups.min(-1), 0.0), jnp.maximum(groups.max(-1), 0.0)


def stored(scales: jax.Array, dtype: str) -> jax.Array:
    """The scales as a checkpoint holds them, in float32; never 0, which nothing could be divided by."""
    # float16's smallest normal number: below, scales lose their digits.
    return jnp.maximum(jnp.abs(scales), 6.2e-5).astype(dtype).astype(jnp.float32) * jnp.where(scales < 0, -1.0, 1.0)


@partial(jax.jit, static_argnames=("bits", "sym", "dtype"))
def choose(low: jax.Array, high: jax.Array, *, bits: int, sym: bool, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of numbers from `low` (not above 0) to `high` (not below): float32 each, shaped like them.

    Symmetric ones reach from minus to plus the larger magnitude.
    """
    most, half = (1 << bits) - 1, 1 << (bits - 1)
    if sym:
        largest = jnp.maximum(-low, high)
        scale = stored(2.0 * largest / most, dtype)
        return scale, jnp.full_like(scale, half)
    scale = stored((high - low) / most, dtype)
    return scale, jnp.clip(jnp.round(-low / scale), 0, most)


def round_to(matrix: jax.Array, scale: jax.Array, zero: jax.Array, bits: int) -> jax.Array:
    """Codes, float: the nearest of 0 .. 2^bits - 1."""
    return jnp.clip(jnp.round(matrix / scale) + zero, 0, (1 << bits) - 1)


@partial(jax.jit, static_argnames=("bits", "sym", "dtype"))
def search(
    groups: jax.Array, gram: jax.Array | None, *, bits: int, sym: bool, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point [N, G] of the range, shrunk by one of `SHRINKS`, that loses least.

    Args:
        groups: [N, G, g].
        gram: [G, g, g], sums of products of inputs: what is lost is the error of outputs; None = that of weights.
    """
    low, high = range_of(groups)

    def loss(factor: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        scale, zero = choose(low * factor, high * factor, bits=bits, sym=sym, dtype=dtype)
        codes = round_to(groups, scale[..., None], zero[..., None], bits)
        error = (codes - zero[..., None]) * scale[..., None] - groups
        if gram is None:
            return (error * error).sum(-1), scale, zero
        return jnp.einsum("ngi,gij,ngj->ng", error, gram, error), scale, zero

    best, scale, zero = loss(jnp.float32(SHRINKS[0]))
    for factor in SHRINKS[1:]:
        found, other, point = loss(jnp.float32(factor))
        better = found < best
        best, scale = jnp.where(better, found, best), jnp.where(better, other, scale)
        zero = jnp.where(better, point, zero)
    return scale, zero


def round_to_float(matrix: jax.Array, scale: jax.Array) -> jax.Array:
    """Numbers of e4m3, as float32: the nearest to matrix / scale."""
    return e4m3.nearest(jnp.clip(matrix / scale, -e4m3.LARGEST, e4m3.LARGEST))


@jax.jit
def block_scales(columns: jax.Array) -> jax.Array:
    """Scales [ceil(N / 128)] of columns [N, at most 128]: a block's largest magnitude becomes the largest number."""
    n = columns.shape[0]
    padded = jnp.pad(jnp.abs(columns), ((0, -n % FP8_BLOCK), (0, 0)))
    return jnp.maximum(padded.reshape(-1, FP8_BLOCK * columns.shape[1]).max(-1), 1e-12) / e4m3.LARGEST


def as_matrix(
    codes: jax.Array | np.ndarray,
    scale: jax.Array,
    zero: jax.Array,
    bits: int,
    group_size: int,
    group_of: np.ndarray | None = None,
) -> QuantizedMatrix:
    """Float codes [N, K] with scales and zero points [N, G]."""
    return QuantizedMatrix(
        np.asarray(codes).astype(np.uint8),
        np.asarray(scale, np.float32),
        np.asarray(zero).astype(np.int32),
        bits,
        group_size,
        group_of,
    )
