"""THE page layout of the KV cache. Every op that reads or writes pages takes it from here.

One array per layer: `[num_pages, 2, num_kv_heads, page_size, head_dim]`, keys at index 0 and values at index 1 of the
second axis.

- A (page, k-or-v, head) is one contiguous `[page_size, head_dim]` tile: what a TMA copy fetches on Hopper, and what
  XLA on CPU gathers in one run of memory (`rows_view`; the transposed layouts cost twice the time there).
- Page 0 is never given to a sequence: padding rows of a step write there, and nothing reads it.
- Quantized pages (int8, float8_e4m3fn) carry one float32 scale per token, head and k-or-v in an array of their own,
  `[num_pages, 2, num_kv_heads, page_size]`: value = stored * scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

NULL_PAGE = 0
QUANTIZED = ("int8", "float8_e4m3fn")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """The pages of one layer.

    Attributes:
        data: [N, 2, K, P, D].
        scales: float32[N, 2, K, P] of quantized pages, otherwise None.
    """

    data: jax.Array
    scales: jax.Array | None = None


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
    def is_quantized(self) -> bool:
        """Whether pages carry scales."""
        return self.dtype in QUANTIZED

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer."""
        per_token = self.head_dim * jnp.dtype(self.dtype).itemsize + (4 if self.is_quantized else 0)
        return 2 * self.num_kv_heads * self.page_size * per_token

    def empty(self) -> Pages:
        """A zeroed cache of one layer."""
        scales = jnp.zeros(self.shape[:4], jnp.float32) if self.is_quantized else None
        return Pages(jnp.zeros(self.shape, self.dtype), scales)


def rows_view(data: jax.Array) -> jax.Array:
    """`[N, 2, K, P, …]` as `[N*2*K, P*…]`, without a copy: row `(n*2 + kv)*K + k` is one head's tile of one page."""
    n, two, k = data.shape[:3]
    return data.reshape(n * two * k, -1)


def quantize(x: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Symmetric quantization of the last axis: `x = stored * scale`, the largest magnitude becomes the largest number.

    Args:
        x: [..., D].
        dtype: int8 or float8_e4m3fn.

    Returns:
        stored [..., D] and scale float32[...]; a row of zeros has scale 0.
    """
    wide = x.astype(jnp.float32)
    is_int = jnp.issubdtype(dtype, jnp.integer)
    limit = float(jnp.iinfo(dtype).max if is_int else jnp.finfo(dtype).max)
    scale = jnp.abs(wide).max(-1) / limit
    stored = wide / jnp.where(scale == 0, 1.0, scale)[..., None]
    stored = jnp.clip(jnp.round(stored) if is_int else stored, -limit, limit)
    return stored.astype(dtype), scale


def dequantize(pages: Pages) -> jax.Array:
    """float32[N, 2, K, P, D]."""
    wide = pages.data.astype(jnp.float32)
    return wide if pages.scales is None else wide * pages.scales[..., None]
