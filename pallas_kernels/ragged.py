"""`RaggedBatch`: sequences of different lengths packed into one row of tokens. Shared by all attention ops."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedBatch:
    """Where each sequence's tokens and pages are.

        tokens   [ s0 s0 s0 | s1 | s2 s2 | padding … ]        T rows
                   ^query_start[0]  ^query_start[2]  ^query_start[num_seqs]

    Attributes:
        query_start: int32[S+1], first token row of each sequence; entries beyond `num_seqs` repeat the last.
        context_lens: int32[S], tokens of the sequence in the cache *after* this step's are written; 0 for padding.
        block_tables: int32[S, B], page ids; entries beyond the context are arbitrary and must never be read into a
            result.
        num_seqs: int32[], sequences that are not padding.
    """

    query_start: jax.Array
    context_lens: jax.Array
    block_tables: jax.Array
    num_seqs: jax.Array


def token_sequences(batch: RaggedBatch, num_tokens: int) -> jax.Array:
    """int32[T]: the sequence of each token row; padding rows get the last sequence slot."""
    rows = jnp.arange(num_tokens, dtype=jnp.int32)
    found = jnp.searchsorted(batch.query_start, rows, side="right", method="compare_all") - 1
    return jnp.minimum(found, batch.context_lens.shape[0] - 1).astype(jnp.int32)


def token_positions(batch: RaggedBatch, num_tokens: int) -> jax.Array:
    """int32[T]: the position of each token row in its sequence; padding rows get 0."""
    sequence = token_sequences(batch, num_tokens)
    rows = jnp.arange(num_tokens, dtype=jnp.int32)
    from_end = batch.query_start[sequence + 1] - rows
    live = rows < batch.query_start[batch.num_seqs]
    return jnp.where(live, batch.context_lens[sequence] - from_end, 0)
