"""The grouped product in XLA: a ragged dot on a GPU, a loop over tiles of rows on a CPU.

XLA's CPU backend makes of a ragged dot the dense product of every row with every expert. The loop reads only the
experts that have rows, and of packed weights converts only theirs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import current_device
from pallas_kernels.grouped_matmul.tiles import row_tiles
from pallas_kernels.quantized_matmul.reference import met
from pallas_kernels.quantized_matmul.weight import QuantizedWeight, dequantize

MAX_TILE = 64


def run(x: jax.Array, weight: jax.Array | QuantizedWeight, group_sizes: jax.Array, out_dtype: Any) -> jax.Array:
    """See `api.grouped_matmul`."""
    if isinstance(weight, QuantizedWeight):
        x = met(x, weight).astype(x.dtype)
    product = by_tiles if current_device().platform == "cpu" else by_ragged_dot
    return product(x, weight, group_sizes).astype(out_dtype)


def by_ragged_dot(x: jax.Array, weight: jax.Array | QuantizedWeight, group_sizes: jax.Array) -> jax.Array:
    """float32[T, N]."""
    if isinstance(weight, QuantizedWeight):
        weight = jnp.swapaxes(dequantize(weight, x.dtype), -1, -2)
    return lax.ragged_dot(x, weight, group_sizes, preferred_element_type=jnp.float32)


def by_tiles(x: jax.Array, weight: jax.Array | QuantizedWeight, group_sizes: jax.Array) -> jax.Array:
    """float32[T, N].

    The last tile of an expert's rows runs over into the next expert's (`tiles.RowTiles`). Tiles are written in order,
    so what one wrote beyond its expert's rows the next one replaces.
    """
    num_tokens = x.shape[0]
    tile = tile_of(num_tokens, group_sizes.shape[0])
    tiles = row_tiles(group_sizes, num_tokens, tile)
    padded = jnp.pad(x, ((0, tile), (0, 0)))
    packed = isinstance(weight, QuantizedWeight)
    outputs = weight.n if packed else weight.shape[2]

    def multiply(index: jax.Array, out: jax.Array) -> jax.Array:
        expert, first = tiles.experts[index], tiles.first_rows[index]
        rows = lax.dynamic_slice_in_dim(padded, first, tile)
        own = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, expert, keepdims=False), weight)
        if isinstance(own, QuantizedWeight):
            own = dequantize(own, x.dtype)
        contract = (((1,), (1 if packed else 0,)), ((), ()))
        product = lax.dot_general(rows, own, contract, preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(out, product, first, 0)

    out = lax.fori_loop(0, tiles.count, multiply, jnp.zeros((num_tokens + tile, outputs), jnp.float32))
    live = jnp.arange(num_tokens) < group_sizes.sum()
    return jnp.where(live[:, None], out[:num_tokens], 0.0)


def tile_of(num_tokens: int, num_experts: int) -> int:
    """Rows of a tile: about an expert's share, at least as many as a CPU's dot needs to be fast."""
    share = -(-num_tokens // num_experts)
    return min(MAX_TILE, max(4, 1 << (share - 1).bit_length()))
