"""The specification of the KV write: one row after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def run(pages: jax.Array, keys: jax.Array, values: jax.Array, slots: jax.Array) -> jax.Array:
    """See `api.kv_write`."""
    page_size = pages.shape[3]
    for row in range(keys.shape[0]):
        new = jnp.stack([keys[row], values[row]]).astype(pages.dtype)
        pages = pages.at[slots[row] // page_size, :, :, slots[row] % page_size].set(new)
    return pages
