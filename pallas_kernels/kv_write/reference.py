"""The specification of the KV write: one row after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_layout import Pages, quantize


def run(pages: Pages, keys: jax.Array, values: jax.Array, slots: jax.Array) -> Pages:
    """See `api.kv_write`."""
    data, scales = pages.data, pages.scales
    page_size = data.shape[3]
    for row in range(keys.shape[0]):
        page, offset = slots[row] // page_size, slots[row] % page_size
        new = jnp.stack([keys[row], values[row]])
        if scales is not None:
            new, scale = quantize(new, data.dtype)
            scales = scales.at[page, :, :, offset].set(scale)
        data = data.at[page, :, :, offset].set(new.astype(data.dtype))
    return Pages(data, scales)
