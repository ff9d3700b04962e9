"""The second kernel of paged attention for Hopper: adds the splits of contexts, always in the same order.

The 8 rows of one kv head that a merge has lie one after the other in memory, so they can be read as 64 rows of D/8
columns: what a warpgroup holds in registers as it holds 64 rows of a product. A row's logarithm lies there 8 times for
that reason. Nothing goes through shared memory, and several splits' results are under way at a time.

Where no sequence is split, the list of merges is empty and the kernel ends at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import MASKED, ROWS_OF_TILE, Hopper, compiler_params, i32
from pallas_kernels.paged_attention import mosaic_plan as columns
from pallas_kernels.paged_attention.mosaic_plan import Plan

PIECES = 8  # of a row: 8 rows of 8 pieces are the 64 rows of a warpgroup's registers
PIECE_COLUMNS = 8  # a piece has a multiple of so many columns
AT_A_TIME = 4  # splits whose results are read at a time
BLOCKS_PER_CORE = 3  # of threads: they wait for memory, so several at a time


def stored_columns(head_dim: int) -> int:
    """Columns of a row of partial results in memory: D, or more so that pieces are whole."""
    return -(-head_dim // (PIECES * PIECE_COLUMNS)) * PIECES * PIECE_COLUMNS


def fold(top: jax.Array, total: jax.Array, log: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One more split, for its row sums.

    Args:
        top, total: float32[rows], largest logarithm (base 2) so far, and the sum of weights relative to it.
        log: float32[rows], the split's.

    Returns:
        New top and total, and what sums so far and the split's result are multiplied with.
    """
    new_top = jnp.maximum(top, log)
    old, new = jnp.exp2(top - new_top), jnp.exp2(log - new_top)
    return new_top, total * old + new, old, new


def weighted(acc: jax.Array, old: jax.Array, result: jax.Array, new: jax.Array) -> jax.Array:
    """`acc * old + result * new`, rows weighted."""
    return acc * lax.broadcast_in_dim(old, acc.shape, [0]) + result * lax.broadcast_in_dim(new, acc.shape, [0])


@dataclass(frozen=True)
class Merge:
    """The kernel's static side."""

    num_kv_heads: int
    head_dim: int
    dtype: str
    window: int | None
    kv_block: int
    num_ctas: int
    ops: Hopper

    def body(self, partial: Any, lse: Any, merges: Any, count: Any, out: Any) -> None:
        """What each block of threads does: every so manieth merge of a head."""
        cta = lax.axis_index("cta")
        turns = lax.div(count[0] * self.num_kv_heads - cta + (self.num_ctas - 1), i32(self.num_ctas))

        @pl.loop(i32(0), turns)
        def _(turn: jax.Array) -> None:
            linear = turn * self.num_ctas + cta
            self._merge(partial, lse, merges, out, lax.div(linear, i32(self.num_kv_heads)), linear)

    def _merge(self, partial: Any, lse: Any, merges: Any, out: Any, entry: jax.Array, linear: jax.Array) -> None:
        head = lax.rem(linear, i32(self.num_kv_heads))
        first, last = i32(0), merges[entry, columns.MERGE_SPLITS] - 1
        if self.window is not None:  # splits before the window were not written
            hidden = jnp.maximum(merges[entry, columns.MERGE_POSITION] - (self.window - 1), 0)
            first = lax.div(hidden, merges[entry, columns.MERGE_SPLIT_BLOCKS] * self.kv_block)
        start, stride = merges[entry, columns.MERGE_PARTIAL], merges[entry, columns.MERGE_STRIDE]
        shape = (ROWS_OF_TILE * PIECES, stored_columns(self.head_dim) // PIECES)
        row_layout = plgpu.Layout.WGMMA.reduce(1)

        def some(index: jax.Array, carry: tuple) -> tuple:
            splits = [first + index * AT_A_TIME + i for i in range(AT_A_TIME)]
            read = []
            for split in splits:
                # Splits beyond the last read it again, which lies in the cache, and count nothing.
                rows = pl.ds((start + jnp.minimum(split, last) * stride) * PIECES, ROWS_OF_TILE * PIECES)
                log = self.ops.load(lse.at[head, rows], row_layout, optimized=False)
                read.append((log, self.ops.load(partial.at[head, rows], plgpu.Layout.WGMMA, optimized=False)))
            acc, top, total = carry
            for split, (log, result) in zip(splits, read, strict=True):
                there = (split <= last).astype(jnp.float32)
                top, total, old, new = fold(top, total, log * there + (1.0 - there) * MASKED)
                acc = weighted(acc, old, result, new)
            return acc, top, total

        rows = (shape[0],)
        zeros = self.ops.cast(jnp.full(shape, 0.0, jnp.float32), plgpu.Layout.WGMMA)
        top = self.ops.cast(jnp.full(rows, MASKED, jnp.float32), row_layout)
        total = self.ops.cast(jnp.full(rows, 0.0, jnp.float32), row_layout)
        trips = lax.div(last - first + AT_A_TIME, i32(AT_A_TIME))
        acc, _, total = lax.fori_loop(i32(0), trips, some, (zeros, top, total))
        result = acc * lax.broadcast_in_dim(1.0 / total, shape, [0])
        out[head, pl.ds(entry * shape[0], shape[0]), :] = result.astype(self.dtype)

    def __call__(self, partial: jax.Array, lse: jax.Array, plan: Plan) -> jax.Array:
        """Add the splits of all merges.

        Args:
            partial: float32[K, X, D'], rows of `stored_columns`.
            lse: float32[K, X, 8], base 2, equal along the last axis.

        Returns:
            [K, M * 8, D'] in the queries' dtype; rows that no merge has, and columns beyond D, are anything.
        """
        kv_heads, _, width = partial.shape
        rows = plan.merges.shape[0] * ROWS_OF_TILE * PIECES
        out = plgpu.kernel(
            self.body,
            out_type=jax.ShapeDtypeStruct((kv_heads, rows, width // PIECES), self.dtype),
            grid=(self.num_ctas,),
            grid_names=("cta",),
            compiler_params=compiler_params(),
            interpret=self.ops.interpret,
        )(
            partial.reshape(kv_heads, -1, width // PIECES),
            lse.reshape(kv_heads, -1),
            plan.merges,
            plan.merge_count,
        )
        return out.reshape(kv_heads, -1, width)
