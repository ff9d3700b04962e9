"""The jitted functions around a `DeviceDrafter`, and how they are lowered."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from engine.runtime.device_state import ForwardState, RowTokens
from engine.runtime.drafting.drafter import DeviceDrafter, DraftRows
from engine.runtime.packing import FROM_DEVICE, StepLayout, context_lengths, token_rows, updated_tables
from engine.runtime.sampling.inputs import Column, SamplerVariant, unpack


def draft_rows(fields: dict[str, jax.Array], block_tables: jax.Array, known: RowTokens) -> DraftRows:
    """The rows of a step before its drafts.

    Args:
        fields: from `StepLayout.unpack`, of a verify bucket.
        block_tables: int32[R+1, B], this step's updates included.
        known: what each row knows of its sequence.
    """
    rows, num_drafts = fields["rows"], fields["num_drafts"]
    num_known = context_lengths(fields, known) - num_drafts
    last = fields["tokens"][jnp.maximum(fields["query_start"][1:] - 1 - num_drafts, 0)]
    return DraftRows(
        rows=rows,
        last_token=jnp.where(last == FROM_DEVICE, known.last_token[rows], last),
        num_known=num_known,
        num_drafts=num_drafts,
        block_tables=block_tables[rows],
        sampling=unpack(fields["sampling"].at[:, Column.POSITION].set(num_known)),
    )


@partial(jax.jit, static_argnames=("drafter", "layout", "variant"), donate_argnames=("state", "draft_state"))
def draft_step(
    weights: Any,
    state: ForwardState,
    draft_state: Any,
    known: RowTokens,
    packed: jax.Array,
    *,
    drafter: DeviceDrafter,
    layout: StepLayout,
    variant: SamplerVariant,
) -> tuple[jax.Array, ForwardState, Any]:
    """Make the drafts of a step, from the very array that its forward pass reads.

    Args:
        weights: of the drafter.
        state: donated.
        draft_state: of the drafter, donated.
        known: last tokens and lengths of the rows.
        packed: int32[layout.size].

    Returns:
        int32[S, K] drafts; the state, block tables of the step included; the drafter's state.
    """
    fields = layout.unpack(packed)
    tables = updated_tables(fields, state.block_tables)
    rows = draft_rows(fields, tables, known)
    drafted = drafter.draft(weights, draft_state, state.cache, rows, layout.bucket.num_logits - 1, variant)
    return drafted.token_ids, ForwardState(drafted.cache, tables), drafted.state


@partial(jax.jit, static_argnames=("drafter", "layout"), donate_argnames=("draft_state",))
def observe_step(
    weights: Any,
    draft_state: Any,
    block_tables: jax.Array,
    known: RowTokens,
    packed: jax.Array,
    draft_ids: jax.Array | None,
    hidden: jax.Array,
    *,
    drafter: DeviceDrafter,
    layout: StepLayout,
) -> Any:
    """Show a step's tokens and hidden states to the drafter.

    Args:
        weights: of the drafter.
        draft_state: of the drafter, donated.
        block_tables: int32[R+1, B], this step's updates included.
        known: of the rows, before the step's sampling.
        packed: int32[layout.size].
        draft_ids: int32[S, K] in verify buckets, otherwise None.
        hidden: [T, E] after the final norm, or the streams of the drafter's taps.
    """
    rows = token_rows(layout.unpack(packed), block_tables, known, layout.bucket.num_logits, draft_ids)
    return drafter.observe(weights, draft_state, rows, hidden)
