"""Paged attention in XLA operations: any platform, fast on CPU. Its cost follows the real contexts, not the longest
possible one.

Two loops with trip counts known only at run time:

- *Rows.* Token rows of sequences with few new tokens (decode, drafts) are sorted by context and taken in groups. A
  group walks over its contexts in chunks of `CHUNK` tokens with an online softmax; sorting keeps the lengths
  within a group alike, so little is wasted.
- *Tiles.* Longer runs of new tokens (prefill chunks) are cut into tiles of query rows of one sequence, of two sizes.
  A tile walks over that sequence's chunks up to its own last position: blocks above the diagonal cost nothing.

Both gather pages by rows of `kv_layout.rows_view`, whose runs of P*D elements XLA on CPU copies at memory speed
(measured: 3-D gathers take twice as long). A batch without one kind runs zero trips of its loop. Chunk boundaries are
absolute positions, so a row is summed in the same order whatever its batch mates are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_layout import Pages, rows_view
from pallas_kernels.ragged import RaggedBatch, token_positions, token_sequences

ROW_LIMIT = 4  # sequences with at most this many new tokens go row by row
ROW_GROUP = 16
CHUNK = 128  # keys per trip, of both loops: the scores of a tile and a chunk just stay in the cache of a core
TILE_ROWS = 128
SHORT_TILE_ROWS = 32  # for sequences with at most SHORT_LIMIT new tokens, which would leave most of a long tile empty
SHORT_LIMIT = 64
MASKED = -1e30  # finite: exp(MASKED - MASKED) must not be NaN in rows that see nothing yet


@partial(jax.tree_util.register_dataclass, data_fields=("count", "sequence", "start"), meta_fields=("rows",))
@dataclass(frozen=True)
class TileList:
    """Tiles of one size.

    Attributes:
        count: int32[], how many of the entries are tiles.
        sequence, start: int32[I], the sequence and first token row of each tile.
        rows: static; query rows per tile. The last tile of a sequence may reach beyond its end.
    """

    count: jax.Array
    sequence: jax.Array
    start: jax.Array
    rows: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Work lists of one step. T token rows, padded to groups; S sequences.

    Attributes:
        order: int32[T'], token rows, those of the row loop first, longest context first; padding is T.
        row_position, row_tables: int32[T'], int32[T', B'] of the ordered rows; position -1 for rows that the loop
            skips.
        num_row_groups: int32[], trip count of the row loop.
        tiles: the long and the short tiles.
        tables: int32[S, B'], block tables padded to whole chunks.
        batch: the batch itself.
    """

    order: jax.Array
    row_position: jax.Array
    row_tables: jax.Array
    num_row_groups: jax.Array
    tiles: tuple[TileList, ...]
    tables: jax.Array
    batch: RaggedBatch


def _group(num_tokens: int) -> int:
    return min(ROW_GROUP, num_tokens)


def _chunk_pages(page_size: int) -> int:
    return max(1, CHUNK // page_size)


def _has_tiles(num_tokens: int) -> bool:
    return num_tokens > ROW_LIMIT


def _tile_list(batch: RaggedBatch, lengths: jax.Array, tile_rows: int, num_tokens: int) -> TileList:
    """Cut the first `lengths` (int32[S], 0 = not in this list) token rows of each sequence into tiles."""
    tile = min(tile_rows, num_tokens)
    num_seqs = lengths.shape[0]
    tiles = (lengths + tile - 1) // tile
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    most = num_tokens // tile + min(num_seqs, num_tokens // (ROW_LIMIT + 1) + 1)
    ids = jnp.arange(most, dtype=jnp.int32)
    found = jnp.searchsorted(ends, ids, side="right", method="compare_all")
    sequence = jnp.minimum(found, num_seqs - 1).astype(jnp.int32)
    start = batch.query_start[sequence] + (ids - (ends - tiles)[sequence]) * tile
    return TileList(ends[-1], sequence, start, tile)


def plan(batch: RaggedBatch, num_tokens: int, problem: Any) -> Plan:
    """See `api.plan_attention`."""
    group = _group(num_tokens)
    num_seqs = batch.context_lens.shape[0]
    chunk_pages = _chunk_pages(problem.page_size)
    tables = jnp.pad(batch.block_tables, ((0, 0), (0, -batch.block_tables.shape[1] % chunk_pages)))

    rows = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence, position = token_sequences(batch, num_tokens), token_positions(batch, num_tokens)
    lengths = batch.query_start[1:] - batch.query_start[:-1]
    live = rows < batch.query_start[batch.num_seqs]
    by_row = live & (lengths[sequence] <= ROW_LIMIT)
    row_position = jnp.where(by_row, position, -1)
    order = jnp.argsort(-row_position, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, -num_tokens % group), constant_values=num_tokens)
    padding = jnp.arange(order.shape[0]) >= num_tokens
    num_by_row = by_row.sum(dtype=jnp.int32)

    by_tile = jnp.where(jnp.arange(num_seqs) < batch.num_seqs, lengths, 0) * (lengths > ROW_LIMIT)
    short = by_tile * (by_tile <= SHORT_LIMIT)
    return Plan(
        order=order,
        row_position=jnp.where(padding, -1, row_position.at[order].get(mode="clip")),
        row_tables=tables[sequence.at[order].get(mode="clip")],
        num_row_groups=(num_by_row + group - 1) // group,
        tiles=tuple(
            _tile_list(batch, part, tile, num_tokens)
            for part, tile in ((by_tile - short, TILE_ROWS), (short, SHORT_TILE_ROWS))
        ),
        tables=tables,
        batch=batch,
    )


def run(
    q: jax.Array,
    pages: Pages,
    plan: Plan,
    problem: Any,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """See `api.paged_attention`."""
    options = _Options(scale, window, soft_cap, _by_group(sinks, problem))
    out = _run_rows(q, pages, plan, jnp.zeros(q.shape, q.dtype), problem, options)
    if _has_tiles(q.shape[0]):
        for tiles in plan.tiles:
            out = _run_tiles(q, pages, plan, tiles, out, problem, options)
    return out


@dataclass(frozen=True)
class _Options:
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: jax.Array | None  # float32[K, H/K]

    def scores(self, scores: jax.Array, visible: jax.Array) -> jax.Array:
        scores = scores * self.scale
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        return jnp.where(visible, scores, MASKED)

    def visible(self, key: jax.Array, query: jax.Array) -> jax.Array:
        seen = key <= query
        return seen if self.window is None else seen & (key > query - self.window)

    def first_chunk(self, position: jax.Array, chunk: int) -> jax.Array:
        if self.window is None:
            return jnp.zeros_like(position)
        return jnp.maximum(position - self.window + 1, 0) // chunk


def _by_group(sinks: jax.Array | None, problem: Any) -> jax.Array | None:
    return None if sinks is None else sinks.astype(jnp.float32).reshape(problem.num_kv_heads, -1)


def _gather(pages: Pages, page_ids: jax.Array, which: int, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Keys (0) or values (1) of some pages, `[..., K, n*P, D]`, and their scales, float32[..., K, n*P] or None; each in
    one gather.

    Args:
        page_ids: int32[..., n].
        dtype: of the keys or values, as stored: the caller applies the scales where that is cheapest.
    """
    kv_heads, _, dim = pages.data.shape[2:]
    heads = jnp.arange(kv_heads, dtype=jnp.int32)
    index = (page_ids[..., None, :] * 2 + which) * kv_heads + heads[:, None]
    shape = (*page_ids.shape[:-1], kv_heads, -1)
    stored = rows_view(pages.data).at[index].get(mode="clip").astype(dtype).reshape(*shape, dim)
    if pages.scales is None:
        return stored, None
    return stored, rows_view(pages.scales).at[index].get(mode="clip").reshape(shape)


def _tile_dtype(q: jax.Array, pages: Pages) -> Any:
    """dtype of a tile's operands: bfloat16 stays (its dots run at twice the speed and its products are exact in the
    float32 sums; int8 and fp8 are exact in it), everything else is float32 (float16 dots are slow on CPU, and would
    overflow)."""
    exact = (jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn)
    return jnp.bfloat16 if q.dtype == jnp.bfloat16 and pages.data.dtype in exact else jnp.float32


def _online(carry: tuple, scores: jax.Array, values: jax.Array, value_scales: jax.Array | None, product: str) -> tuple:
    """One chunk of the online softmax. `carry` = running maximum, sum and weighted values; `value_scales` are shaped
    like the scores, or None."""
    top, total, acc = carry
    new_top = jnp.maximum(top, scores.max(-1))
    weights = jnp.exp(scores - new_top[..., None])
    shrink = jnp.exp(top - new_top)
    total = total * shrink + weights.sum(-1)
    if value_scales is not None:
        weights = weights * value_scales
    acc = acc * shrink[..., None] + jnp.einsum(
        product, weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return new_top, total, acc


def _empty(shape: tuple[int, ...], head_dim: int, sinks: jax.Array | None) -> tuple:
    """The carry before the first chunk; a sink (shaped to broadcast to `shape`) is a score that has been seen."""
    top = jnp.full(shape, MASKED, jnp.float32) if sinks is None else jnp.broadcast_to(sinks, shape)
    total = jnp.full(shape, 0.0 if sinks is None else 1.0, jnp.float32)
    return top, total, jnp.zeros((*shape, head_dim), jnp.float32)


def _finish(carry: tuple) -> jax.Array:
    top, total, acc = carry
    seen = top > MASKED / 2
    return jnp.where(seen[..., None], acc / jnp.where(seen, total, 1.0)[..., None], 0.0)


def _run_rows(q: jax.Array, pages: Pages, plan: Plan, out: jax.Array, problem: Any, options: _Options) -> jax.Array:
    """Write the results of the row loop into `out`."""
    num_tokens, heads, dim = q.shape
    kv_heads, group = problem.num_kv_heads, _group(num_tokens)
    chunk_pages = _chunk_pages(problem.page_size)
    chunk = chunk_pages * problem.page_size

    def one_group(index: jax.Array, out: jax.Array) -> jax.Array:
        members = lax.dynamic_slice_in_dim(plan.order, index * group, group)
        position = lax.dynamic_slice_in_dim(plan.row_position, index * group, group)
        tables = lax.dynamic_slice_in_dim(plan.row_tables, index * group, group)
        # float32 for every dtype: with few query rows a bfloat16 dot is slower than converting while gathering.
        queries = q.at[members].get(mode="clip").astype(jnp.float32).reshape(group, kv_heads, heads // kv_heads, dim)

        def one_chunk(step: jax.Array, carry: tuple) -> tuple:
            ids = lax.dynamic_slice_in_dim(tables, step * chunk_pages, chunk_pages, axis=1)
            key_position = step * chunk + jnp.arange(chunk, dtype=jnp.int32)
            visible = options.visible(key_position, position[:, None])[:, None, None, :]  # [G, 1, 1, C]
            keys, key_scales = _gather(pages, ids, 0, jnp.float32)  # [G, K, C, D]
            values, value_scales = _gather(pages, ids, 1, jnp.float32)
            # What lies beyond the context may be anything, NaN included: 0 * NaN would poison the sum.
            values = jnp.where(visible[:, :, 0, :, None], values, 0.0)
            scores = jnp.einsum("gkrd,gkcd->gkrc", queries, keys)
            if key_scales is not None and value_scales is not None:
                scores = scores * key_scales[:, :, None]
                value_scales = jnp.where(visible[:, :, 0], value_scales, 0.0)[:, :, None]
            return _online(carry, options.scores(scores, visible), values, value_scales, "gkrc,gkcd->gkrd")

        first = options.first_chunk(jnp.where(position < 0, position.max(), position), chunk).min()
        carry = lax.fori_loop(
            first, position.max() // chunk + 1, one_chunk, _empty(queries.shape[:3], dim, options.sinks)
        )
        # Rows of the last group that belong to tiles get 0 here, and their values from the tile loops after this one.
        return out.at[members].set(_finish(carry).reshape(group, heads, dim).astype(out.dtype), mode="drop")

    return lax.fori_loop(0, plan.num_row_groups, one_group, out)


def _run_tiles(
    q: jax.Array, pages: Pages, plan: Plan, tiles: TileList, out: jax.Array, problem: Any, options: _Options
) -> jax.Array:
    """Write the results of one list of tiles into `out`."""
    num_tokens, heads, dim = q.shape
    kv_heads, tile = problem.num_kv_heads, tiles.rows
    queries_per_kv = heads // kv_heads
    chunk_pages = _chunk_pages(problem.page_size)
    chunk = chunk_pages * problem.page_size
    operand = _tile_dtype(q, pages)
    batch = plan.batch

    def one_tile(index: jax.Array, out: jax.Array) -> jax.Array:
        sequence, start = tiles.sequence[index], tiles.start[index]
        last = batch.query_start[sequence + 1] - 1
        # The slice must lie within the batch. Its rows outside of the tile belong to others: they see nothing here and
        # are not written.
        first_row = jnp.minimum(start, num_tokens - tile)
        row = first_row + jnp.arange(tile, dtype=jnp.int32)
        position = jnp.where((row >= start) & (row <= last), batch.context_lens[sequence] - 1 - last + row, -1)
        queries = lax.dynamic_slice_in_dim(q, first_row, tile).astype(operand)
        queries = queries.reshape(tile, kv_heads, queries_per_kv, dim).transpose(1, 2, 0, 3)
        queries = queries.reshape(kv_heads, queries_per_kv * tile, dim)
        table = plan.tables[sequence]

        def one_chunk(step: jax.Array, carry: tuple) -> tuple:
            ids = lax.dynamic_slice_in_dim(table, step * chunk_pages, chunk_pages)
            key_position = step * chunk + jnp.arange(chunk, dtype=jnp.int32)
            visible = options.visible(key_position, position[:, None])  # [tile, C]
            keys, key_scales = _gather(pages, ids, 0, operand)  # [K, C, D]
            values, value_scales = _gather(pages, ids, 1, operand)
            known = key_position < batch.context_lens[sequence]
            values = jnp.where(known[:, None], values, 0)
            scores = jnp.einsum("kmd,kcd->kmc", queries, keys, preferred_element_type=jnp.float32)
            if key_scales is not None and value_scales is not None:
                scores = scores * key_scales[:, None]
                value_scales = jnp.where(known, value_scales, 0.0)[:, None]
            scores = options.scores(scores.reshape(kv_heads, queries_per_kv, tile, chunk), visible)
            scores = scores.reshape(kv_heads, queries_per_kv * tile, chunk)
            return _online(carry, scores, values, value_scales, "kmc,kcd->kmd")

        sinks = None if options.sinks is None else jnp.repeat(options.sinks, tile, axis=1)  # as the rows of the scores
        first = options.first_chunk(batch.context_lens[sequence] - 1 - last + start, chunk)
        carry = lax.fori_loop(first, position.max() // chunk + 1, one_chunk, _empty(queries.shape[:2], dim, sinks))
        result = _finish(carry).reshape(kv_heads, queries_per_kv, tile, dim).transpose(2, 0, 1, 3)
        result = result.reshape(tile, heads, dim).astype(out.dtype)
        current = lax.dynamic_slice_in_dim(out, first_row, tile)
        result = jnp.where((position >= 0)[:, None, None], result, current)
        return lax.dynamic_update_slice_in_dim(out, result, first_row, axis=0)

    return lax.fori_loop(0, tiles.count, one_tile, out)
