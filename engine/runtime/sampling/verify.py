"""`verify`: sampling after each of a sequence's drafts, and how many of them were right.

Each position is sampled as it would be without drafts: from the same processed distribution, with the noise that
belongs to (seed, position). A draft is right if it is the token sampled there. So a sequence gets exactly the tokens
that it would get without drafts, at any temperature and with any parameters; and as the draft is a fixed token, it is
accepted with the probability that the distribution gives it, which is what rejection sampling (Leviathan et al. 2023,
arXiv 2211.17192) does with a proposal that is certain of its token. Drafts that were themselves drawn, with the noise
of the same (seed, position), agree far more often than independent draws would (Gumbel coupling: Daliri, Musco and
Suresh 2024, arXiv 2408.07978).

    tokens    known | d1     d2     d3
    logits        l0    l1     l2     l3
    sampled       t0    t1     t2     t3      t0 = d1, t1 = d2, t2 != d3: count = 3, the next tokens are t0 t1 t2
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from engine.runtime.sampling import vocab
from engine.runtime.sampling.inputs import SamplerVariant, SamplingInputs
from engine.runtime.sampling.logprobs import NUM_TOP, LogprobArrays
from engine.runtime.sampling.sampler import SampledTokens, draw, sample
from engine.runtime.sampling.state import SamplerState


def verify(
    logits: jax.Array,
    inputs: SamplingInputs,
    num_drafts: jax.Array,
    draft_ids: jax.Array,
    state: SamplerState,
    variant: SamplerVariant,
    num_top: int = NUM_TOP,
) -> tuple[SampledTokens, SamplerState]:
    """Sample after the last known token of each sequence and after its drafts.

    Args:
        logits: float32[S * L, V], L = K + 1 rows of each sequence.
        inputs: of the S sequences; `position` is that of the first token to be sampled.
        num_drafts: int32[S], at most K.
        draft_ids: int32[S, K].
        state: donate it with the step.
        variant: static; at least what `choose_variant` says of the batch.
        num_top: static; how many of the most probable tokens FULL returns.

    Returns:
        Tokens int32[S * L] (and logprobs) with their `count`, and the state after the tokens that count.
    """
    num_seqs, rows = draft_ids.shape[0], draft_ids.shape[1] + 1
    logits = logits.astype(jnp.float32)
    logprobs: LogprobArrays | None = None
    if variant is SamplerVariant.FULL:
        sampled, state = _one_after_another(logits, inputs, num_drafts, draft_ids, state, num_top)
        token, logprobs = sampled.token, sampled.logprobs
    elif variant is SamplerVariant.GREEDY:
        token = vocab.argmax(logits)
    else:
        each = jax.tree.map(lambda column: jnp.repeat(column, rows, axis=0), inputs)
        ahead = jnp.tile(jnp.arange(rows, dtype=jnp.int32), num_seqs)
        token = draw(logits, replace(each, position=each.position + ahead))
    count = num_right(token.reshape(num_seqs, rows), num_drafts, draft_ids) + 1
    return SampledTokens(token, logprobs, count), state


def num_right(tokens: jax.Array, num_drafts: jax.Array, draft_ids: jax.Array) -> jax.Array:
    """int32[S]: leading drafts that are the tokens sampled in their places.

    Args:
        tokens: int32[S, K + 1].
        num_drafts: int32[S].
        draft_ids: int32[S, K].
    """
    places = jnp.arange(draft_ids.shape[1], dtype=jnp.int32)
    right = (tokens[:, :-1] == draft_ids) & (places < num_drafts[:, None])
    return jnp.cumprod(right.astype(jnp.int32), axis=1).sum(axis=1)


def _one_after_another(
    logits: jax.Array,
    inputs: SamplingInputs,
    num_drafts: jax.Array,
    draft_ids: jax.Array,
    state: SamplerState,
    num_top: int,
) -> tuple[SampledTokens, SamplerState]:
    """Place by place, because what a parameter does to one (penalties, bad words) depends on the tokens before it. A
    sequence whose draft was wrong goes on in the padding row, and changes nothing any more.
    """
    num_seqs, rows = draft_ids.shape[0], draft_ids.shape[1] + 1
    by_place = logits.reshape(num_seqs, rows, -1)
    drafts = jnp.concatenate([draft_ids, jnp.full((num_seqs, 1), -1, jnp.int32)], axis=1)

    def place(carry: tuple[SamplerState, jax.Array], index: jax.Array) -> tuple[tuple, SampledTokens]:
        state, alive = carry
        here = replace(
            inputs,
            row=jnp.where(alive, inputs.row, state.padding_row),
            position=inputs.position + index,
        )
        sampled, state = sample(by_place[:, index], here, state, SamplerVariant.FULL, num_top)
        alive = alive & (sampled.token == drafts[:, index]) & (index < num_drafts)
        return (state, alive), sampled

    start = (state, jnp.ones((num_seqs,), bool))
    (state, _), places = lax.scan(place, start, jnp.arange(rows, dtype=jnp.int32))
    # [L, S, ...] -> [S * L, ...]
    flat = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(num_seqs * rows, *x.shape[2:]), places)
    return flat, state
