"""The KV write as one scatter (two with scales), which XLA keeps in place when the cache is donated."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_layout import NULL_PAGE, Pages, quantize


def run(pages: Pages, keys: jax.Array, values: jax.Array, slots: jax.Array) -> Pages:
    """See `api.kv_write`."""
    page_size = pages.data.shape[3]
    if keys.shape[0] == 1:
        # XLA turns a one-row scatter into a dynamic-update-slice that copies the whole cache; a second row keeps it in
        # place.
        keys, values = jnp.concatenate([keys, keys]), jnp.concatenate([values, values])
        slots = jnp.concatenate([slots, jnp.full((1,), NULL_PAGE, slots.dtype)])
    new = jnp.stack([keys, values], axis=1)  # [T, 2, K, D]
    if pages.scales is None:
        return Pages(_scatter(pages.data, slots, new, page_size))
    stored, scales = quantize(new, pages.data.dtype)
    return Pages(_scatter(pages.data, slots, stored, page_size), _scatter(pages.scales, slots, scales, page_size))


def _scatter(array: jax.Array, slots: jax.Array, rows: jax.Array, page_size: int) -> jax.Array:
    """[N, 2, K, P, ...] with [T, 2, K, ...] in their slots."""
    index = (slots // page_size, slice(None), slice(None), slots % page_size)
    return array.at[index].set(rows.astype(array.dtype), mode="promise_in_bounds")
