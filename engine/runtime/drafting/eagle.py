"""`EagleDrafter`: an EAGLE or EAGLE-3 head with KV pages of its own, one per block of the pool.

The head reads the model's state of a position and the token after it. A step computes both for all of its tokens but
the first, whose state the step before has left (`recent.py`): so a step shows the head the pairs

    position of the head   start - 1      start          …    stop - 2
    state                  h[start - 1]   h[start]       …    h[stop - 2]
    token                  t[start]       t[start + 1]   …    t[stop - 1]

and needs to know nothing of what is sampled. Pairs of drafts that were wrong lie beyond the end of the sequence, and
are written again. Where the state before the first token is not there (the start of a sequence, or behind a hit of the
prefix cache), that pair is left out: the page keeps what it holds. What is wrong in a page costs guesses, no answer.

    draft      K passes of one pair a row: the last token with the state before it, then each draft with the head's own
               output
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from engine.runtime.drafting.drafter import DeviceDrafter, Drafted, DraftRows
from engine.runtime.drafting.loop import choose_tokens
from engine.runtime.drafting.recent import RecentStates, no_states, recall, remember
from engine.runtime.packing import TokenRows
from engine.runtime.sampling.inputs import SamplerVariant
from models.decoder import Decoder
from models.drafters.eagle import EagleHead
from models.functional import FunctionalModel, Params
from pallas_kernels.kv_layout import NULL_PAGE, KVLayout, Pages
from pallas_kernels.ragged import RaggedBatch, token_positions, token_sequences


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EagleState:
    """What persists.

    Attributes:
        pages: of each of the head's layers.
        recent: features of the last positions.
    """

    pages: tuple[Pages, ...]
    recent: RecentStates


@dataclass(frozen=True)
class EagleParts:
    """What an `EagleDrafter` is made of.

    Attributes:
        head: structure of the head. params: its weights.
        ends: structure of the model without its layers: embedding table and output head. end_params: their weights.
        layout: of one layer's pages, of any number.
        taps: of the model's layers, whose streams the head reads; () for the final hidden states.
        num_layers, size: of the head.
    """

    head: FunctionalModel[EagleHead]
    params: Params
    ends: FunctionalModel[Decoder]
    end_params: Params
    layout: KVLayout
    taps: tuple[int, ...]
    num_layers: int
    size: int


class EagleDrafter(DeviceDrafter):
    """See the module.

    Args:
        parts: the head and what it borrows.
        num_drafts: K.
        dtype: of features.
    """

    observes = True

    def __init__(self, parts: EagleParts, num_drafts: int, dtype: str) -> None:
        self.weights = (parts.params, parts.end_params)
        self.extra_bytes = sum(array.on_device_size_in_bytes() for array in jax.tree.leaves(parts.params))
        self.block_bytes = parts.layout.page_bytes * parts.num_layers
        self.taps = parts.taps
        self._parts, self._num_drafts, self._dtype = parts, num_drafts, dtype

    def make_state(self, num_pages: int, num_rows: int) -> EagleState:
        """See `DeviceDrafter`."""
        given = self._parts.layout
        layout = KVLayout(num_pages, given.num_kv_heads, given.page_size, given.head_dim, given.dtype)
        recent = no_states(num_rows, self._num_drafts + 1, self._parts.size, self._dtype)
        return EagleState(tuple(layout.empty() for _ in range(self._parts.num_layers)), recent)

    def observe(self, weights: Any, state: EagleState, rows: TokenRows, hidden: jax.Array) -> EagleState:
        """See `DeviceDrafter`; `hidden` are the streams of the taps side by side, if there are any."""
        head, ends = self._bind(weights)
        features = head.features(hidden).astype(self._dtype)
        pairs = pairs_of(rows, features, state.recent)
        positions = token_positions(pairs.batch, features.shape[0])
        _, pages = head(ends, pairs.token_ids, pairs.features, positions, pairs.batch, state.pages)
        return EagleState(pages, remember(state.recent, rows, features))

    def draft(
        self,
        weights: Any,
        state: EagleState,
        cache: tuple[Pages, ...],
        rows: DraftRows,
        count: int,
        variant: SamplerVariant,
    ) -> Drafted:
        """See `DeviceDrafter`."""
        head, ends = self._bind(weights)
        features, _ = recall(state.recent, rows.rows, rows.num_known - 2)

        def step(carry: tuple, place: jax.Array) -> tuple[tuple, jax.Array]:
            pages, tokens, features = carry
            batch = _pass(rows, place)
            features, pages = head(ends, tokens, features, batch.context_lens - 1, batch, pages)
            tokens = choose_tokens(head.logits(ends, features), rows, place, variant)
            return (pages, tokens, features), tokens

        start = (state.pages, rows.last_token, features)
        (pages, _, _), ids = lax.scan(step, start, jnp.arange(count, dtype=jnp.int32))
        return Drafted(ids.T, cache, EagleState(pages, state.recent))

    def _bind(self, weights: Any) -> tuple[EagleHead, Decoder]:
        params, end_params = weights
        return self._parts.head.bind(params), self._parts.ends.bind(end_params)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pairs:
    """The pairs of a step: at most T, those that are left out taken away.

    Attributes:
        token_ids: int32[T].
        features: [T, E], of the position before each token.
        batch: in the head's positions, one less than the tokens'.
    """

    token_ids: jax.Array
    features: jax.Array
    batch: RaggedBatch


def pairs_of(rows: TokenRows, features: jax.Array, recent: RecentStates) -> Pairs:
    """The pairs that a step completes.

    Args:
        rows: T tokens of S sequences.
        features: [T, E].
        recent: features of the steps before.
    """
    batch, num_tokens = rows.batch, features.shape[0]
    lengths = batch.query_start[1:] - batch.query_start[:-1]
    before, found = recall(recent, rows.rows, batch.context_lens - lengths - 1)
    left_out = (lengths > 0) & ~found
    shift = jnp.cumsum(left_out.astype(jnp.int32))  # tokens taken away up to and with each sequence
    query_start = batch.query_start.at[1:].add(-shift)
    context_lens = jnp.maximum(batch.context_lens - 1, 0)
    shown = RaggedBatch(query_start, context_lens, batch.block_tables, batch.num_seqs)
    sequence = token_sequences(shown, num_tokens)
    token = jnp.minimum(jnp.arange(num_tokens, dtype=jnp.int32) + shift[sequence], num_tokens - 1)
    is_first = token == batch.query_start[sequence]
    previous = jnp.where(is_first[:, None], before[sequence], features[jnp.maximum(token - 1, 0)])
    return Pairs(rows.token_ids[token], previous, shown)


def _pass(rows: DraftRows, place: jax.Array) -> RaggedBatch:
    """One pair of each row. Rows without such a draft are sequences in the null page."""
    live, count = place < rows.num_drafts, rows.rows.shape[0]
    return RaggedBatch(
        query_start=jnp.arange(count + 1, dtype=jnp.int32),
        context_lens=jnp.where(live, jnp.maximum(rows.num_known - 1 + place, 1), 1).astype(jnp.int32),
        block_tables=jnp.where(live[:, None], rows.block_tables, NULL_PAGE),
        num_seqs=jnp.int32(count),
    )
