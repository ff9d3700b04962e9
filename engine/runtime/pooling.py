"""Sums of hidden states on the device, for requests that are only pooled.

Hidden states are as large as the whole step, and all that a pooled request needs of them is one vector: they stay on
the device, and only `POOL_ROWS` vectors at a time come to the host, in steps that have pooled requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from engine.requests.sequence import Sequence
from engine.scheduling.plan import ScheduledSequence, StepPlan

POOL_ROWS = 8  # sums per call: more pooled sequences than that in one step take more calls


@dataclass(frozen=True)
class PooledPart:
    """What one step adds to the sum of one sequence.

    Attributes:
        sequence: whose.
        start: position of the first token of the chunk; 0 = the sum begins (anew, after a preemption).
        total: float32[E]; a promise of the device until it is read.
        is_last: True if the prompt ends with this chunk.
    """

    sequence: Sequence
    start: int
    total: np.ndarray
    is_last: bool


@dataclass(frozen=True)
class PooledGroup:
    """Up to `POOL_ROWS` items of a plan, and float32[P, E], their sums, on the device."""

    items: tuple[ScheduledSequence, ...]
    sums: jax.Array

    def parts(self) -> list[PooledPart]:
        """The sums on the host; waits for the step."""
        sums = np.asarray(self.sums)
        return [PooledPart(item.sequence, item.start, sums[row], item.samples) for row, item in enumerate(self.items)]


@jax.jit
def pool_rows(hidden: jax.Array, ranges: jax.Array) -> jax.Array:
    """Sum ranges of rows in float32. Rows outside of a range do not reach its sum, whatever they hold.

    Args:
        hidden: [T, E].
        ranges: int32[P, 2], first row and the one after the last.

    Returns:
        float32[P, E].
    """
    rows = jnp.arange(hidden.shape[0])
    wanted = (rows >= ranges[:, :1]) & (rows < ranges[:, 1:])
    return jnp.where(wanted[:, :, None], hidden.astype(jnp.float32)[None], 0.0).sum(1)


def pool_step(
    plan: StepPlan, hidden: jax.Array, find: Callable[[int], Callable[[jax.Array, np.ndarray], jax.Array]]
) -> tuple[PooledGroup, ...]:
    """Start the sums of a step's pooled sequences.

    Args:
        hidden: [T, E], of the step.
        find: (T) -> `pool_rows`, compiled for T; asked only if something is pooled.
    """
    wanted: list[tuple[ScheduledSequence, int, int]] = []
    offset = 0
    for item in plan.items:
        stop = offset + item.num_tokens
        pooling = item.sequence.request.pooling
        if pooling is not None and pooling.pooling == "mean":
            wanted.append((item, offset, stop))
        elif pooling is not None and item.samples:
            wanted.append((item, stop - 1, stop))
        offset = stop
    groups = []
    for first in range(0, len(wanted), POOL_ROWS):
        group = wanted[first : first + POOL_ROWS]
        ranges = np.zeros((POOL_ROWS, 2), np.int32)
        ranges[: len(group)] = [(start, stop) for _, start, stop in group]
        sums = find(hidden.shape[0])(hidden, ranges)
        sums.copy_to_host_async()
        groups.append(PooledGroup(tuple(item for item, _, _ in group), sums))
    return tuple(groups)
