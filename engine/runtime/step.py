"""The functions of one step: `forward`, then `sample`. Pure, fixed shapes, state donated by name.

Two executables rather than one (docs/decisions/0001): the forward pass comes in (tokens, sequences) buckets, sampling
in (sequences, variant) buckets, and their product would multiply compilation; and a grammar mask can be built on the
host while the forward pass runs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from engine.runtime.device_state import ForwardState, RowTokens, SampleState
from engine.runtime.packing import StepLayout, token_rows, updated_tables
from engine.runtime.sampling import (
    LogprobArrays,
    SampledTokens,
    SamplerVariant,
    prompt_logprobs,
    sample,
    split_drafts,
    unpack,
    verify,
)
from models.decoder import Decoder
from models.functional import FunctionalModel, Params
from models.inputs import ForwardInputs

PROMPT_LOGPROB_ROWS = 32  # rows of logits held at a time while scoring a prompt


@partial(jax.jit, static_argnames=("model", "layout", "taps"), donate_argnames=("state",))
def forward(
    params: Params,
    state: ForwardState,
    known: RowTokens,
    packed: jax.Array,
    draft_ids: jax.Array | None,
    *,
    model: FunctionalModel[Decoder],
    layout: StepLayout,
    taps: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array, ForwardState, jax.Array | None]:
    """Run the model over one packed batch.

    Args:
        params: the weights.
        state: donated.
        known: last tokens and lengths of the rows.
        packed: int32[layout.size].
        draft_ids: int32[S, K] in verify buckets, if the device guesses itself.
        taps: after how many layers somebody wants to see the residual stream.

    Returns:
        hidden [T, E] after the final norm; logits float32[S * L, V] of each sequence's last L token rows
        (`Bucket.num_logits`); sampling parameters int32[S, W], with drafts behind them if L > 1; the advanced state;
        the streams [T, taps * E], None without taps.
    """
    fields = layout.unpack(packed)
    tables = updated_tables(fields, state.block_tables)
    rows = token_rows(fields, tables, known, layout.bucket.num_logits, draft_ids)
    bound = model.bind(params)
    inputs = ForwardInputs(rows.token_ids, rows.positions, rows.logit_rows, rows.batch)
    hidden, streams, cache = bound.run_tapped(inputs, state.cache, taps)
    logits = bound.logits(hidden[rows.logit_rows])
    return hidden, logits, rows.sampling, ForwardState(cache, tables), streams


@partial(jax.jit, donate_argnames=("state",))
def update_tables(state: ForwardState, updates: jax.Array) -> ForwardState:
    """Write int32[U, 3] (row, index, block) entries when a step has more of them than its packed array holds (prefix
    cache hits).
    """
    tables = state.block_tables.at[updates[:, 0], updates[:, 1]].set(updates[:, 2], mode="promise_in_bounds")
    return ForwardState(state.cache, tables)


@partial(jax.jit, donate_argnames=("logits",))
def mask_logits(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Ban the tokens that a grammar forbids.

    Args:
        logits: float32[S, V], donated.
        mask: int32[S, W], W = ceil(V / 32); bit t % 32 of word t // 32 is 1 if token t may follow.

    Returns:
        float32[S, V], -inf where the bit is 0.
    """
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    allowed = bits.reshape(mask.shape[0], -1)[:, : logits.shape[1]] != 0
    return jnp.where(allowed, logits, -jnp.inf)


@partial(jax.jit, static_argnames=("variant",), donate_argnames=("state",))
def sample_step(
    logits: jax.Array, sampling: jax.Array, state: SampleState, *, variant: SamplerVariant
) -> tuple[SampledTokens, SampleState]:
    """Sample one token per sequence and remember it in the sequence's row.

    Args:
        logits: float32[S, V].
        sampling: int32[S, W]; sequences that do not sample in this step carry the padding row.
        state: donated.
    """
    inputs = unpack(sampling)
    sampled, sampler = sample(logits, inputs, state.sampler, variant)
    return sampled, SampleState(_advanced(state.rows, inputs.row, sampled.token, inputs.position + 1), sampler)


@partial(jax.jit, static_argnames=("variant",), donate_argnames=("state",))
def verify_step(
    logits: jax.Array, sampling: jax.Array, state: SampleState, *, variant: SamplerVariant
) -> tuple[SampledTokens, SampleState]:
    """Sample after the known tokens of each sequence and after its drafts, and remember the last token that counts.

    Args:
        logits: float32[S * L, V].
        sampling: int32[S, W + L], see `sampling.with_drafts`.
        state: donated.
    """
    block, num_drafts, draft_ids = split_drafts(sampling)
    inputs = unpack(block)
    sampled, sampler = verify(logits, inputs, num_drafts, draft_ids, state.sampler, variant)
    assert sampled.count is not None
    tokens = sampled.token.reshape(draft_ids.shape[0], -1)
    last = jnp.take_along_axis(tokens, sampled.count[:, None] - 1, axis=1)[:, 0]
    return sampled, SampleState(_advanced(state.rows, inputs.row, last, inputs.position + sampled.count), sampler)


def _advanced(known: RowTokens, row: jax.Array, token: jax.Array, num_known: jax.Array) -> RowTokens:
    return RowTokens(
        known.last_token.at[row].set(token, mode="promise_in_bounds"),
        known.num_known.at[row].set(num_known, mode="promise_in_bounds"),
    )


@partial(jax.jit, static_argnames=("model",))
def score_prompt(
    params: Params, hidden: jax.Array, targets: jax.Array, *, model: FunctionalModel[Decoder]
) -> tuple[jax.Array, LogprobArrays]:
    """Logprobs of known tokens, `PROMPT_LOGPROB_ROWS` rows at a time.

    Args:
        hidden: [C, E], of the positions before the targets.
        targets: int32[C], the tokens that actually follow.

    Returns:
        float32[C, V] logits, and the targets' scores.
    """
    logits = model.bind(params).logits(hidden)
    return logits, prompt_logprobs(logits, targets)
