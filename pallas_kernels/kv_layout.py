"""THE page layout of the KV cache. Every op that reads or writes pages takes it from here.

One array per layer: `[num_pages, 2, num_kv_heads, page_size, head_dim]`, keys at index 0 and values at index 1 of the
    second axis.

- A (page, k-or-v, head) is one contiguous `[page_size, head_dim]` tile: what a TMA copy fetches on Hopper, and what
  XLA on CPU gathers in one run of memory (`rows_view`; the transposed layouts cost twice the time there).
- Page 0 is never given to a sequence: padding rows of a step write there, and nothing reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

NULL_PAGE = 0


@dataclass(frozen=True)
class KVLayout:
    """Shape and dtype of one layer's pages."""

    num_pages: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[pages, 2, K, P, D]."""
        return (self.num_pages, 2, self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer."""
        return 2 * self.num_kv_heads * self.page_size * self.head_dim * jnp.dtype(self.dtype).itemsize

    def empty(self) -> jax.Array:
        """A zeroed cache of one layer."""
        return jnp.zeros(self.shape, self.dtype)


def rows_view(pages: jax.Array) -> jax.Array:
    """`[N, 2, K, P, D]` as `[N*2*K, P*D]`, without a copy: row `(n*2 + kv)*K + k` is one head's tile of one page."""
    n, two, k, p, d = pages.shape
    return pages.reshape(n * two * k, p * d)
