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
    """float32[size, size] of +1 and -1, symmetric, rows orthogonal.

    Raises:
        ValueError: size is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a rotation of {size} inputs: not a power of two")
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotate(x: jax.Array, size: int) -> jax.Array:
    """Blocks of the last axis turned; twice is the identity.

    A small dense product: on a CPU it is faster than sums and differences in six stages
    (docs/decisions/0009-rotated-activations.md), and a GPU has tensor cores for it. +1 and -1 are exact in every dtype,
    sums are float32.

    Args:
        x: [..., K], float.
        size: of a block; a power of two that divides K.

    Returns:
        [..., K] in the dtype of x; float16 becomes bfloat16, as sums may leave its range.
    """
    narrow = x.dtype.itemsize == 2
    matrix = jnp.asarray(hadamard(size), x.dtype)
    precision = None if narrow else lax.Precision.HIGHEST
    dims = (((1,), (0,)), ((), ()))
    sums = lax.dot_general(x.reshape(-1, size), matrix, dims, precision=precision, preferred_element_type=jnp.float32)
    turned = sums.reshape(x.shape) * (1.0 / math.sqrt(size))
    return turned.astype(jnp.bfloat16 if narrow else x.dtype)
