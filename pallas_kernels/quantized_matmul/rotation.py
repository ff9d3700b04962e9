"""Inputs turned block by block, so that no few of them are far larger than the others.

    y = (x R) (R^T W),   R = H / sqrt(b) on each block of b inputs, H of +1 and -1 (Sylvester's), R = R^T = R^-1

A token's activations that are rounded to integers share one scale. A few large ones take its whole range; turned, they
are spread over their block (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456). `R^T W` is made once, at load.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LEAST = 16  # inputs of a block: fewer spread too little


def hadamard(size: int) -> np.ndarray:
    """float32[size, size] of +1 and -1, symmetric, rows orthogonal; size is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotate(x: jax.Array, size: int) -> jax.Array:
    """Blocks of the last axis turned; twice is the identity. +1 and -1 are exact in every dtype, sums are float32.

    16-bit inputs: a small dense product, which a CPU does faster than stages and a GPU's tensor cores do in passing
    (docs/decisions/0009-rotated-activations.md). Float32: sums and differences in stages, whose order is the same for
    any number of rows, so that a token's result does not depend on its batch mates; dots choose theirs by the shape.

    Args:
        x: [..., K], float.
        size: of a block; a power of two that divides K.

    Returns:
        [..., K] in the dtype of x; float16 becomes bfloat16, as sums may leave its range.

    Raises:
        ValueError: a size that cannot be.
    """
    if size < LEAST or size & (size - 1) or x.shape[-1] % size:
        raise ValueError(
            f"a rotation of {size} inputs: a power of two, {LEAST} or more, and a part of all {x.shape[-1]}"
        )
    narrow = x.dtype.itemsize == 2
    blocks = x.reshape(-1, size)
    if narrow:
        matrix = jnp.asarray(hadamard(size), x.dtype)
        sums = lax.dot_general(blocks, matrix, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    else:
        sums = _in_stages(blocks)
    turned = sums.reshape(x.shape) * (1.0 / math.sqrt(size))
    return turned.astype(jnp.bfloat16 if narrow else x.dtype)


def _in_stages(blocks: jax.Array) -> jax.Array:
    """[B, b]: rows times Hadamard's matrix by log2(b) stages of sums and differences."""
    rows, size = blocks.shape
    half = 1
    while half < size:
        pairs = blocks.reshape(rows, -1, 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        blocks = jnp.stack([first + second, first - second], axis=2).reshape(rows, size)
        half *= 2
    return blocks
