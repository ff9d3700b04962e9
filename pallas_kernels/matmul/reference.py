"""The specification of the matrix product: float32 throughout, rounded once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def run(x: jax.Array, weight: jax.Array, transposed: bool, out_dtype: Any) -> jax.Array:
    """See `api.matmul`."""
    w = weight.astype(jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), w.T if transposed else w, precision="highest").astype(out_dtype)
