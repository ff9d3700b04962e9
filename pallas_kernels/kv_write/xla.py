"""The KV write as one scatter, which XLA keeps in place when the cache is donated."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_layout import NULL_PAGE


def run(pages: jax.Array, keys: jax.Array, values: jax.Array, slots: jax.Array) -> jax.Array:
    """See `api.kv_write`."""
    page_size = pages.shape[3]
    if keys.shape[0] == 1:
        # XLA turns a one-row scatter into a dynamic-update-slice that copies the whole cache; a second row keeps it in
        # place.
        keys, values = jnp.concatenate([keys, keys]), jnp.concatenate([values, values])
        slots = jnp.concatenate([slots, jnp.full((1,), NULL_PAGE, slots.dtype)])
    new = jnp.stack([keys, values], axis=1).astype(pages.dtype)  # [T, 2, K, D]
    return pages.at[slots // page_size, :, :, slots % page_size].set(new, mode="promise_in_bounds")
