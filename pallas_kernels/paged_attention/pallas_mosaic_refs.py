"""What the warpgroups of the paged attention kernel share: memory and barriers by name, and how they are indexed."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import ROWS_OF_TILE, i32


class Refs(NamedTuple):
    """What the kernel sees. R packed rows, X rows of partial results, W compute warpgroups, C keys per block."""

    q: Any  # [R, K, D]
    pages: Any  # [N*2*K, P, D]
    items: Any  # int32[I, 12]
    count: Any  # int32[1]
    tables: Any  # int32[S, B]
    out: Any  # [R, K, D]
    q_smem: Any  # [W * buffers, 64, D]
    k_smem: Any  # [stages, C, D]
    v_smem: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    v_clean: Any = None  # two warpgroups: the first has cleaned the values
    sinks: Any = None  # float32[K, G + 64 W], periodic
    partial: Any = None  # float32[K, X, D'], see `pallas_mosaic_merge`
    lse: Any = None  # float32[K, X, 8], base 2, equal along the last axis
    partial_smem: Any = None  # float32[64, columns]
    lse_smem: Any = None  # float32[64, 8]
    scales: Any = None  # float32[N*2*K, P], and all that follows: quantized pages
    narrow_k: Any = None  # [stages, C, D]
    narrow_v: Any = None
    narrow_k_scale: Any = None  # float32[stages, pages of a block, 32]
    narrow_v_scale: Any = None
    k_scale: Any = None  # float32[1, C]
    v_scale: Any = None
    narrow_k_full: Any = None
    narrow_v_full: Any = None
    narrow_k_free: Any = None
    narrow_v_free: Any = None


class Task(NamedTuple):
    """One item and one kv head: scalars."""

    item: jax.Array
    head: jax.Array
    position: jax.Array  # of the sequence's first new token
    context: jax.Array
    low: jax.Array  # key blocks [low, high) to visit
    high: jax.Array


def eights(start: jax.Array, size: int) -> Any:
    """Rows from a multiple of 8 on, which the compiler must be told."""
    return pl.ds(pl.multiple_of(start, ROWS_OF_TILE), size)


def slot_of(number: jax.Array, count: int) -> jax.Array:
    """The slot of `count` that block `number` (not below 0) goes through.

    Of a single slot it is 0, but the compiler must not know: it would compute every address in it before the loops, and
    keep more of them than there are registers.
    """
    return lax.rem(number, i32(count)) if count > 1 else jnp.minimum(number, 0)
