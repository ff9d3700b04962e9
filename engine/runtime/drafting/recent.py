"""What the model made of the last tokens of each row: where heads go on from.

A step that verifies drafts computes states of tokens that turn out to be wrong, and which those are is known after its
sampling only. So the states of its last L tokens are kept, and the next step, which knows how many tokens the sequence
has, picks the one that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from engine.runtime.packing import TokenRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecentStates:
    """The states of each row's last step.

    Attributes:
        states: [R+1, L, W], of positions `last - L + 1` to `last`.
        first, last: int32[R+1], positions that the last step computed, those of its drafts included; -1 if none.
    """

    states: jax.Array
    first: jax.Array
    last: jax.Array


def no_states(num_rows: int, length: int, width: int, dtype: str) -> RecentStates:
    """Nothing computed yet: R rows (and one of padding), L states of W numbers."""
    none = [jnp.full((num_rows + 1,), -1, jnp.int32) for _ in range(2)]
    return RecentStates(jnp.zeros((num_rows + 1, length, width), dtype), *none)


def states_bytes(num_rows: int, length: int, width: int, dtype: str) -> int:
    """Bytes of `no_states`, less the few of the positions."""
    return (num_rows + 1) * length * width * jnp.dtype(dtype).itemsize


def remember(recent: RecentStates, rows: TokenRows, states: jax.Array) -> RecentStates:
    """Keep the last states of a step.

    Args:
        recent: of the steps before.
        rows: T tokens of S sequences.
        states: [T, W].
    """
    batch, length = rows.batch, recent.states.shape[1]
    ends = batch.query_start[1:] - 1
    last = batch.context_lens - 1
    first = batch.context_lens - (batch.query_start[1:] - batch.query_start[:-1])
    places = ends[:, None] - jnp.arange(length - 1, -1, -1, dtype=jnp.int32)
    return RecentStates(
        recent.states.at[rows.rows].set(states[jnp.maximum(places, 0)].astype(recent.states.dtype)),
        recent.first.at[rows.rows].set(first),
        recent.last.at[rows.rows].set(last),
    )


def recall(recent: RecentStates, rows: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The states of one position of each sequence.

    Args:
        recent: as kept.
        rows: int32[S], of the device state.
        positions: int32[S].

    Returns:
        [S, W], zeros where there is none, and bool[S] whether there is one.
    """
    length = recent.states.shape[1]
    place = length - 1 - (recent.last[rows] - positions)
    found = (positions >= recent.first[rows]) & (positions <= recent.last[rows]) & (positions >= 0) & (place >= 0)
    states = recent.states[rows, jnp.clip(place, 0, length - 1)]
    return jnp.where(found[:, None], states, 0), found
