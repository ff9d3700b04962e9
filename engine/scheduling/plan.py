"""`StepPlan`: what each sequence computes in one step. Frozen, host only: no arrays, no jax."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from engine.requests.sequence import Sequence

MOST_DRAFTS = 32  # of one sequence in a step
FROM_DRAFT = -2  # in the place of a draft that only the device knows


class ScheduledSequence(NamedTuple):
    """The part of one sequence in one step. A tuple: hundreds are made per step, each in a third of the time.

    Attributes:
        sequence: whose.
        row: its row of the device state.
        start: position of the first token computed; equals the sequence's `num_computed` before the step.
        num_tokens: how many tokens are computed: positions `[start, start + num_tokens)`, drafts included.
        samples: True if computed catches up with known, so that the step samples the next token (or, of a pooled
            sequence, gives its result).
        first_new_block: index into the block table of the first entry that the device has not been told yet.
        starts_row: True if the sequence takes over its row in this step (admission or return after preemption).
        drafts: guesses of the tokens that follow the known ones. They are the last that are computed, and the step
            verifies them: it samples after each, and keeps as many as were guessed right. `FROM_DRAFT` stands for those
            that the device makes itself when the step begins.
        is_relative: True if a step in flight verifies drafts of the sequence: only the device knows how many were
            right. `start` and all counts of the sequence then are what they would be if all were.
    """

    sequence: Sequence
    row: int
    start: int
    num_tokens: int
    samples: bool
    first_new_block: int
    starts_row: bool
    drafts: tuple[int, ...] = ()
    is_relative: bool = False


@dataclass(frozen=True)
class StepPlan:
    """One step.

    Attributes:
        step_id: counts from 0.
        items: the sequences in the step, each with at least one token.
        preempted: sequences that lost their blocks to make this step possible.
    """

    step_id: int
    items: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...] = ()

    # Cached: several ask, and each answer is a walk over all items.

    @cached_property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum([item.num_tokens for item in self.items])

    @cached_property
    def most_drafts(self) -> int:
        """Drafts of the sequence that has most of them in the step."""
        return max([len(item.drafts) for item in self.items], default=0)

    @property
    def num_sampled(self) -> int:
        """Sequences that sample in the step."""
        return sum(item.samples for item in self.items)
