"""The work list of the Mosaic GPU kernel: made once per step, on the device, shared by all layers.

Queries of one kv head are *rows*: row `token * G + head` of a sequence's `[tokens, G]`. All rows of all sequences are
packed one after the other, each sequence from a multiple of 8 on (offsets of TMA copies into tiled shared memory).
A *tile* is a run of at most `tile_rows` rows of one sequence. Tiles of sequences with few new tokens are cut along
their context into *splits*. An *item* is one split of one tile; the kernel's blocks of threads take items of the list
by turns. A *merge* adds the splits of 8 rows.

    rows     [ s0: 4 rows, pad to 8 | s1: 300 rows, pad to 304 | … ]
    items    [ s0/split 0, s0/split 1, s1/tile 2, s1/tile 1, s1/tile 0, … | unused ]
    merges   [ s0/rows 0-7, … | unused ]

The lists are compact and their lengths are numbers on the device: bounds that are known statically (every sequence as
long as its block table) are mostly empty, and a grid of them would start thousands of blocks that exit at once.

How a sequence is cut depends on its own lengths and on the configuration alone, never on its batch mates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic import ROWS_OF_TILE
from pallas_kernels.paged_attention.config import WARPGROUP_ROWS, AttentionConfig
from pallas_kernels.paged_attention.problem import AttentionProblem
from pallas_kernels.ragged import RaggedBatch, token_sequences

SPLIT_QUERIES = 8  # sequences with more new tokens are not split: their tiles are work enough

# Columns of an item.
SEQUENCE, ROW, ROWS, OFFSET, POSITION, LAST, CONTEXT, LOW, HIGH, PARTIAL, FINAL = range(11)
COLUMNS = 12
# Columns of a merge.
MERGE_PARTIAL, MERGE_STRIDE, MERGE_SPLITS, MERGE_POSITION, MERGE_SPLIT_BLOCKS = range(5)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "items",
        "count",
        "merges",
        "merge_count",
        "tables",
        "row_token",
        "row_head",
        "token_row",
        "token_merged",
        "live",
    ),
    meta_fields=("config", "partial_rows"),
)
@dataclass(frozen=True)
class Plan:
    """Work lists and packing of one step. I items, M merges, R packed rows, T tokens, S sequences.

    Attributes:
        items: int32[I, 12]. SEQUENCE; ROW, ROWS: first packed row of the tile and how many rows it has; OFFSET: of its
            first row among the sequence's rows; POSITION of the sequence's first new token; LAST: position of the
            tile's last row; CONTEXT length; LOW, HIGH: key blocks to visit; PARTIAL: row of its partial results, -1 if
            it writes final ones; FINAL: 1 for the last split.
        count: int32[1], how many of the entries are items.
        merges: int32[M, 5], 8 rows each. MERGE_PARTIAL: row of their first split's partial results; MERGE_STRIDE: rows
            from one split's to the next's; MERGE_SPLITS; MERGE_POSITION: of the sequence's
            first new token; MERGE_SPLIT_BLOCKS: key blocks per split.
        merge_count: int32[1].
        tables: int32[S, B].
        row_token, row_head: int32[R], token and head (within its group) of each packed row.
        token_row: int32[T], packed row of each token's first head.
        token_merged: int32[T], row of its first head among the results of merges; -1: the items' results are final.
        live: bool[T], False for padding.
        config, partial_rows: static; as resolved, capacity for partial results, 0 if nothing is ever split.
    """

    items: jax.Array
    count: jax.Array
    merges: jax.Array
    merge_count: jax.Array
    tables: jax.Array
    row_token: jax.Array
    row_head: jax.Array
    token_row: jax.Array
    token_merged: jax.Array
    live: jax.Array
    config: AttentionConfig
    partial_rows: int


@dataclass(frozen=True)
class _Bounds:
    """What is known of a step statically.

    Attributes:
        group: query heads per kv head. seqs: sequences with tokens, at most. splits: of one context, at most.
        split_rows: rows of sequences that are split, at most, padding included.
    """

    num_tokens: int
    group: int
    seqs: int
    splits: int
    split_rows: int

    @classmethod
    def of(cls, batch: RaggedBatch, num_tokens: int, problem: AttentionProblem, config: AttentionConfig) -> _Bounds:
        num_seqs, width = batch.block_tables.shape
        group, seqs = problem.num_heads // problem.num_kv_heads, min(num_seqs, num_tokens)
        blocks = -(-width * problem.page_size // config.kv_block)
        rows = min(num_tokens * group, seqs * min(WARPGROUP_ROWS, SPLIT_QUERIES * group))
        return cls(
            num_tokens,
            group,
            seqs,
            splits=min(config.max_splits, -(-blocks * config.kv_block // config.split_tokens)),
            split_rows=_up_to_8(rows + (ROWS_OF_TILE - 1) * seqs),
        )

    @property
    def partial_rows(self) -> int:
        """Rows of partial results, if every sequence is split and as long as its table."""
        return self.split_rows * self.splits if self.splits > 1 else 0


@dataclass(frozen=True)
class _Sequences:
    """How each sequence is cut, int32[S]; `is_split`: bool[S]."""

    lengths: jax.Array
    contexts: jax.Array
    rows: jax.Array
    padded: jax.Array
    row_start: jax.Array
    split_blocks: jax.Array
    splits: jax.Array
    is_split: jax.Array
    partial_start: jax.Array

    @property
    def first_position(self) -> jax.Array:
        return self.contexts - self.lengths


def _up_to_8(rows: int) -> int:
    return -(-rows // ROWS_OF_TILE) * ROWS_OF_TILE


def _ceil_div(a: jax.Array | int, b: jax.Array | int) -> jax.Array:
    return jnp.asarray((a + b - 1) // b, jnp.int32)


def _starts(sizes: jax.Array) -> jax.Array:
    """Exclusive sums."""
    return jnp.cumsum(sizes, dtype=jnp.int32) - sizes


def _owner(starts: jax.Array, ids: jax.Array) -> jax.Array:
    """Index of the last start that is not beyond each id."""
    return (jnp.searchsorted(starts, ids, side="right", method="compare_all") - 1).astype(jnp.int32)


def _cut(batch: RaggedBatch, bounds: _Bounds, config: AttentionConfig) -> _Sequences:
    """Cut contexts into splits."""
    real = jnp.arange(batch.context_lens.shape[0]) < batch.num_seqs
    lengths = jnp.where(real, batch.query_start[1:] - batch.query_start[:-1], 0)
    contexts = jnp.where(real, batch.context_lens, 0)
    rows = lengths * bounds.group
    padded = _ceil_div(rows, ROWS_OF_TILE) * ROWS_OF_TILE
    blocks = _ceil_div(contexts, config.kv_block)
    split_blocks = jnp.maximum(config.split_tokens // config.kv_block, _ceil_div(blocks, bounds.splits))
    may_split = (lengths > 0) & (lengths <= SPLIT_QUERIES) & (rows <= WARPGROUP_ROWS)
    splits = jnp.where(may_split, _ceil_div(blocks, split_blocks), 1)
    return _Sequences(
        lengths=lengths,
        contexts=contexts,
        rows=rows,
        padded=padded,
        row_start=_starts(padded),
        split_blocks=split_blocks,
        splits=splits,
        is_split=splits > 1,
        partial_start=_starts(jnp.where(splits > 1, padded * splits, 0)),
    )


def _items(seqs: _Sequences, bounds: _Bounds, config: AttentionConfig) -> tuple[jax.Array, jax.Array]:
    """The list of items and its length."""
    block, tile_rows = config.kv_block, config.tile_rows
    tiles = _ceil_div(seqs.rows, tile_rows)
    counts = jnp.where(seqs.is_split, seqs.splits, tiles)
    item_start = _starts(counts)
    ids = jnp.arange(bounds.seqs * bounds.splits + bounds.num_tokens * bounds.group // tile_rows, dtype=jnp.int32)
    s = _owner(item_start, ids)
    is_split, local = seqs.is_split[s], ids - item_start[s]
    split = jnp.where(is_split, local, 0)
    tile = jnp.where(is_split, 0, tiles[s] - 1 - local)  # last tile first: it has most keys to visit
    offset = tile * tile_rows
    tile_size = jnp.minimum(seqs.rows[s] - offset, tile_rows)
    last = seqs.first_position[s] + (offset + tile_size - 1) // bounds.group
    low = split * seqs.split_blocks[s]
    high = last // block + 1
    columns = {
        SEQUENCE: s,
        ROW: seqs.row_start[s] + offset,
        ROWS: tile_size,
        OFFSET: offset,
        POSITION: seqs.first_position[s],
        LAST: last,
        CONTEXT: seqs.contexts[s],
        LOW: low,
        HIGH: jnp.where(is_split, jnp.minimum(high, low + seqs.split_blocks[s]), high),
        PARTIAL: jnp.where(is_split, seqs.partial_start[s] + split * seqs.padded[s], -1),
        FINAL: split == jnp.where(is_split, seqs.splits[s] - 1, 0),
    }
    unused = jnp.zeros_like(ids)
    items = jnp.stack([columns.get(c, unused).astype(jnp.int32) for c in range(COLUMNS)], axis=1)
    return items, counts.sum(dtype=jnp.int32)[None]


def _merges(seqs: _Sequences, bounds: _Bounds) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The list of merges, its length, and each sequence's first entry."""
    counts = jnp.where(seqs.is_split, seqs.padded // ROWS_OF_TILE, 0)
    start = _starts(counts)
    capacity = min(bounds.split_rows, bounds.partial_rows // 2) // ROWS_OF_TILE  # who is split has two splits or more
    ids = jnp.arange(max(1, capacity), dtype=jnp.int32)
    s = _owner(start, ids)
    columns = {
        MERGE_PARTIAL: seqs.partial_start[s] + (ids - start[s]) * ROWS_OF_TILE,
        MERGE_STRIDE: seqs.padded[s],
        MERGE_SPLITS: seqs.splits[s],
        MERGE_POSITION: seqs.first_position[s],
        MERGE_SPLIT_BLOCKS: seqs.split_blocks[s],
    }
    merges = jnp.stack([columns[c] for c in range(len(columns))], axis=1).astype(jnp.int32)
    return merges, counts.sum(dtype=jnp.int32)[None], start


def make_plan(batch: RaggedBatch, num_tokens: int, problem: AttentionProblem, config: AttentionConfig) -> Plan:
    """See `api.plan_attention`."""
    bounds = _Bounds.of(batch, num_tokens, problem, config)
    group = bounds.group
    seqs = _cut(batch, bounds, config)
    items, count = _items(seqs, bounds, config)
    merges, merge_count, merge_start = _merges(seqs, bounds)

    # Per packed row, and back. Tiles are read whole: the last one must not reach beyond the end.
    num_rows = _up_to_8(num_tokens * group + (ROWS_OF_TILE - 1) * bounds.seqs + config.tile_rows)
    row_ids = jnp.arange(num_rows, dtype=jnp.int32)
    row_seq = _owner(seqs.row_start, row_ids)
    row_local = row_ids - seqs.row_start[row_seq]
    token_seq = token_sequences(batch, num_tokens)
    row_in_seq = (jnp.arange(num_tokens, dtype=jnp.int32) - batch.query_start[token_seq]) * group
    merged = merge_start[token_seq] * ROWS_OF_TILE + row_in_seq
    return Plan(
        items=items,
        count=count,
        merges=merges,
        merge_count=merge_count,
        tables=batch.block_tables,
        row_token=jnp.minimum(batch.query_start[row_seq] + row_local // group, num_tokens - 1),
        row_head=row_local % group,
        token_row=seqs.row_start[token_seq] + row_in_seq,
        token_merged=jnp.where(seqs.is_split[token_seq], merged, -1),
        live=jnp.arange(num_tokens) < batch.query_start[batch.num_seqs],
        config=config,
        partial_rows=bounds.partial_rows,
    )
