"""The matrix product as one XLA dot."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import current_device


def run(x: jax.Array, weight: jax.Array, transposed: bool, out_dtype: Any) -> jax.Array:
    """See `api.matmul`."""
    rows = x.shape[0]
    if rows == 1 and x.dtype.itemsize == 2 and current_device().platform == "cpu":
        # A one-row 16-bit dot falls on a scalar path, 8 to 15 times slower than with two rows
        # (docs/measurements/cpu-dots.md).
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    product = lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)
    return product[:rows].astype(out_dtype)
