"""K passes of a decoder over one new token of each sequence: a draft feeds the next.

Drafts are drawn as the model draws: the best token where a row is greedy, otherwise with temperature, min_p, top_k and
top_p of the row and with the noise of its (seed, position), so that they agree with the model's own draws as often as
possible (docs/decisions/0008). Penalties, bans and grammars are left out: that costs a guess, not an answer.

The passes are one loop on the device, whose cache goes from pass to pass in place.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from engine.runtime.drafting.drafter import DraftRows
from engine.runtime.sampling import vocab
from engine.runtime.sampling.inputs import SamplerVariant
from engine.runtime.sampling.sampler import draw
from models.decoder import Decoder
from models.inputs import ForwardInputs
from pallas_kernels.kv_layout import NULL_PAGE, Pages
from pallas_kernels.ragged import RaggedBatch

Cache = tuple[Pages, ...]


def batch_of(rows: DraftRows, place: jax.Array | int, extra: int = 0) -> RaggedBatch:
    """The pass that makes draft `place` of each row, from the token before it.

    Rows that make no such draft are sequences in the null page, which anybody may write to and nobody reads.

    Args:
        rows: S sequences.
        place: 0 to K.
        extra: passes of a row beyond its drafts.
    """
    live = (rows.num_drafts > 0) & (place < rows.num_drafts + extra)
    return RaggedBatch(
        query_start=jnp.arange(rows.rows.shape[0] + 1, dtype=jnp.int32),
        context_lens=jnp.where(live, rows.num_known + place, 1).astype(jnp.int32),
        block_tables=jnp.where(live[:, None], rows.block_tables, NULL_PAGE),
        num_seqs=jnp.int32(rows.rows.shape[0]),
    )


def choose_tokens(logits: jax.Array, rows: DraftRows, place: jax.Array | int, variant: SamplerVariant) -> jax.Array:
    """int32[S], draft `place` of each row from float32[S, V] logits."""
    if variant is SamplerVariant.GREEDY:
        return vocab.argmax(logits)
    inputs = rows.sampling
    return draw(logits, replace(inputs, position=inputs.position + place))


def draft_tokens(
    decoder: Decoder, cache: Cache, rows: DraftRows, count: int, variant: SamplerVariant, *, own_cache: bool
) -> tuple[jax.Array, Cache]:
    """Drafts of a decoder.

    Args:
        decoder: with its weights.
        cache: its pages, one per block of the pool, with keys and values of all tokens before the last.
        rows: S sequences.
        count: K.
        variant: GREEDY or RANDOM.
        own_cache: nobody else computes its keys and values: those of the last draft are added too, in case it is right.

    Returns:
        int32[S, K] and the cache.
    """
    extra = int(own_cache)
    ends = jnp.arange(rows.rows.shape[0], dtype=jnp.int32)

    def one_pass(cache: Cache, tokens: jax.Array, place: jax.Array | int) -> tuple[jax.Array, Cache]:
        batch = batch_of(rows, place, extra)
        return decoder(ForwardInputs(tokens, batch.context_lens - 1, ends, batch), cache)

    def step(carry: tuple[Cache, jax.Array], place: jax.Array) -> tuple[tuple[Cache, jax.Array], jax.Array]:
        hidden, cache = one_pass(*carry, place)
        drafts = choose_tokens(decoder.logits(hidden), rows, place, variant)
        return (cache, drafts), drafts

    (cache, last), ids = lax.scan(step, (cache, rows.last_token), jnp.arange(count, dtype=jnp.int32))
    if own_cache:
        _, cache = one_pass(cache, last, count)
    return ids.T, cache
