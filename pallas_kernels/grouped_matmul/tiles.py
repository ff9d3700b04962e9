"""Rows sorted by expert, cut into tiles that belong to one expert each."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowTiles:
    """Where each tile's rows are.

        rows   [ e0 e0 e0 e0 e0 | e2 e2 | padding ]        tiles of 4 rows
        tiles  [ e0 e0 e0 e0 ][ e0 .. .. .. ][ e2 e2 .. .. ]

    Attributes:
        experts: int32[I], the expert of each tile; those beyond `count` are arbitrary.
        first_rows: int32[I], its first row.
        count: int32[], tiles that have rows.
        first_tiles: int32[E], the first tile of each expert.
        starts, ends: int32[E], rows of each expert.
    """

    experts: jax.Array
    first_rows: jax.Array
    count: jax.Array
    first_tiles: jax.Array
    starts: jax.Array
    ends: jax.Array


def row_tiles(group_sizes: jax.Array, num_tokens: int, tile: int) -> RowTiles:
    """Tiles of `tile` rows over groups of the given sizes.

    There are at most T // tile whole ones, and one that is not for each expert with rows: that is I.
    """
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    per_expert = -(-group_sizes // tile)
    last = jnp.cumsum(per_expert)
    index = jnp.arange(max(1, num_tokens // tile + min(num_tokens, group_sizes.shape[0])), dtype=jnp.int32)
    found = jnp.searchsorted(last, index, side="right", method="compare_all")
    experts = jnp.minimum(found, group_sizes.shape[0] - 1).astype(jnp.int32)
    first_tiles = last - per_expert
    first_rows = starts[experts] + (index - first_tiles[experts]) * tile
    return RowTiles(experts, first_rows, last[-1], first_tiles, starts, ends)


def spread(x: jax.Array, tiles: RowTiles, tile: int) -> jax.Array:
    """[I * tile, ...]: each tile's rows, at multiples of `tile`; what a tile has no rows for is arbitrary."""
    rows = tiles.first_rows[:, None] + jnp.arange(tile, dtype=jnp.int32)
    return x[jnp.minimum(rows.reshape(-1), x.shape[0] - 1)]


def gathered(spread_rows: jax.Array, tiles: RowTiles, tile: int, num_tokens: int) -> jax.Array:
    """[T, ...]: the rows of `spread` in their first order; rows of no expert are 0."""
    row = jnp.arange(num_tokens, dtype=jnp.int32)
    expert = jnp.searchsorted(tiles.ends, row, side="right", method="compare_all")
    live = expert < tiles.ends.shape[0]
    expert = jnp.minimum(expert, tiles.ends.shape[0] - 1)
    found = spread_rows[tiles.first_tiles[expert] * tile + row - tiles.starts[expert]]
    return jnp.where(live[:, None], found, 0)
