"""The work list of the Mosaic GPU kernel: made once per step, on the device, shared by all layers.

Queries of one kv head are *rows*: row `token * G + head` of a sequence's `[tokens, G]`. All rows of all sequences are
packed one after the other, each sequence from a multiple of 8 on (offsets of TMA copies into tiled shared memory).
A *tile* is a run of at most `tile_rows` rows of one sequence. Tiles of sequences with few new tokens are cut along
their context into *splits*. An *item* is one split of one tile; the kernel's blocks of threads take items of the list
by turns.

    rows     [ s0: 4 rows, pad to 8 | s1: 300 rows, pad to 304 | … ]
    items    [ s0/split 0, s0/split 1, s1/tile 2, s1/tile 1, s1/tile 0, … | unused ]

The list is compact and its length is a number on the device: bounds that are known statically (every sequence as long
as its block table) are mostly empty, and a grid of them would start thousands of blocks that exit at once.

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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "items",
        "count",
        "tables",
        "row_token",
        "row_head",
        "token_row",
        "token_item",
        "token_in_tile",
        "token_partial",
        "token_stride",
        "token_splits",
        "token_first",
        "split_blocks",
        "live",
    ),
    meta_fields=("config", "max_splits", "partial_rows"),
)
@dataclass(frozen=True)
class Plan:
    """Work list and packing of one step. I items, R packed rows, T tokens, S sequences.

    Attributes:
        items: int32[I, 12]. SEQUENCE; ROW, ROWS: first packed row of the tile and how many rows it has; OFFSET: of its
            first row among the sequence's rows; POSITION of the sequence's first new token; LAST: position of the
            tile's last row; CONTEXT length; LOW, HIGH: key blocks to visit; PARTIAL: row of its partial results, -1 if
            it writes final ones; FINAL: 1 for the last split.
        count: int32[1], how many of the entries are items.
        tables: int32[S, B].
        row_token, row_head: int32[R], token and head (within its group) of each packed row.
        token_row: int32[T], packed row of each token's first head.
        token_item, token_in_tile: int32[T], its sequence's first item, and the row of its first head in a tile that is
            split.
        token_partial, token_stride, token_splits: int32[T], row of its first partial result, rows from one split's to
            the next's, number of splits; 0 splits: the result is final.
        token_first: int32[T], position of the sequence's first new token.
        split_blocks: int32[T], key blocks per split.
        live: bool[T], False for padding.
        config, max_splits, partial_rows: static; as resolved, splits of the longest context that tables can describe,
            capacity for partial results.
    """

    items: jax.Array
    count: jax.Array
    tables: jax.Array
    row_token: jax.Array
    row_head: jax.Array
    token_row: jax.Array
    token_item: jax.Array
    token_in_tile: jax.Array
    token_partial: jax.Array
    token_stride: jax.Array
    token_splits: jax.Array
    token_first: jax.Array
    split_blocks: jax.Array
    live: jax.Array
    config: AttentionConfig
    max_splits: int
    partial_rows: int


def _ceil_div(a: jax.Array | int, b: jax.Array | int) -> jax.Array:
    return jnp.asarray((a + b - 1) // b, jnp.int32)


def _starts(sizes: jax.Array) -> jax.Array:
    """Exclusive sums."""
    return jnp.cumsum(sizes, dtype=jnp.int32) - sizes


def _owner(starts: jax.Array, ids: jax.Array) -> jax.Array:
    """Index of the last start that is not beyond each id."""
    return (jnp.searchsorted(starts, ids, side="right", method="compare_all") - 1).astype(jnp.int32)


def make_plan(batch: RaggedBatch, num_tokens: int, problem: AttentionProblem, config: AttentionConfig) -> Plan:
    """See `api.plan_attention`."""
    num_seqs, width = batch.block_tables.shape
    group = problem.num_heads // problem.num_kv_heads
    block, tile_rows = config.kv_block, config.tile_rows
    most_seqs = min(num_seqs, num_tokens)
    most_blocks = -(-width * problem.page_size // block)
    min_split = config.split_tokens // block
    max_splits = min(config.max_splits, -(-most_blocks // min_split))

    # Per sequence.
    real = jnp.arange(num_seqs) < batch.num_seqs
    lengths = jnp.where(real, batch.query_start[1:] - batch.query_start[:-1], 0)
    contexts = jnp.where(real, batch.context_lens, 0)
    rows = lengths * group
    padded = _ceil_div(rows, ROWS_OF_TILE) * ROWS_OF_TILE
    row_start = _starts(padded)
    blocks = _ceil_div(contexts, block)
    split_blocks = jnp.maximum(min_split, _ceil_div(blocks, max_splits))
    is_split = (lengths <= SPLIT_QUERIES) & (rows <= WARPGROUP_ROWS) & (max_splits > 1) & (lengths > 0)
    splits = jnp.where(is_split, _ceil_div(blocks, split_blocks), 1)
    partial_start = _starts(jnp.where(is_split, padded * splits, 0))
    tiles = _ceil_div(rows, tile_rows)
    counts = tiles * splits  # one of the two is 1, or both
    item_start = _starts(counts)
    first_position = contexts - lengths

    # Per item.
    capacity = most_seqs * max_splits + num_tokens * group // tile_rows
    ids = jnp.arange(capacity, dtype=jnp.int32)
    s = _owner(item_start, ids)
    local = ids - item_start[s]
    split = jnp.where(is_split[s], local, 0)
    tile = jnp.where(is_split[s], 0, tiles[s] - 1 - local)  # last tile first: it has most keys to visit
    offset = tile * tile_rows
    tile_size = jnp.minimum(rows[s] - offset, tile_rows)
    last = first_position[s] + (offset + tile_size - 1) // group
    low = split * split_blocks[s]
    high = last // block + 1
    columns = {
        SEQUENCE: s,
        ROW: row_start[s] + offset,
        ROWS: tile_size,
        OFFSET: offset,
        POSITION: first_position[s],
        LAST: last,
        CONTEXT: contexts[s],
        LOW: low,
        HIGH: jnp.where(is_split[s], jnp.minimum(high, low + split_blocks[s]), high),
        PARTIAL: jnp.where(is_split[s], partial_start[s] + split * padded[s], -1),
        FINAL: (split == splits[s] - 1).astype(jnp.int32),
    }
    unused = jnp.zeros_like(ids)
    items = jnp.stack([columns.get(c, unused) for c in range(COLUMNS)], axis=1).astype(jnp.int32)

    # Per packed row, and back. Tiles are read whole: the last one must not reach beyond the end.
    num_rows = num_tokens * group + (ROWS_OF_TILE - 1) * most_seqs + tile_rows
    row_ids = jnp.arange(-(-num_rows // ROWS_OF_TILE) * ROWS_OF_TILE, dtype=jnp.int32)
    row_seq = _owner(row_start, row_ids)
    row_local = row_ids - row_start[row_seq]
    token_seq = token_sequences(batch, num_tokens)
    in_seq = jnp.arange(num_tokens, dtype=jnp.int32) - batch.query_start[token_seq]
    most_partial = min(num_tokens * group, most_seqs * min(WARPGROUP_ROWS, SPLIT_QUERIES * group))
    most_partial += (ROWS_OF_TILE - 1) * most_seqs
    return Plan(
        items=items,
        count=counts.sum(dtype=jnp.int32)[None],
        tables=batch.block_tables,
        row_token=jnp.minimum(batch.query_start[row_seq] + row_local // group, num_tokens - 1),
        row_head=row_local % group,
        token_row=row_start[token_seq] + in_seq * group,
        token_item=item_start[token_seq],
        token_in_tile=in_seq * group,
        token_partial=partial_start[token_seq] + in_seq * group,
        token_stride=padded[token_seq],
        token_splits=jnp.where(is_split, splits, 0)[token_seq],
        token_first=first_position[token_seq],
        split_blocks=split_blocks[token_seq],
        live=jnp.arange(num_tokens) < batch.query_start[batch.num_seqs],
        config=config,
        max_splits=max_splits,
        partial_rows=-(-most_partial // ROWS_OF_TILE) * ROWS_OF_TILE * max_splits if max_splits > 1 else 0,
    )
