"""Drafts of one sequence: how many go into a plan, and what is taken back once it is known how many were right."""

from __future__ import annotations

from engine.requests.sequence import Sequence, SequenceStatus
from engine.scheduling.allocator import KVAllocator


def take_drafts(
    sequence: Sequence, num_tokens: int, budget: int, max_len: int, allocator: KVAllocator
) -> tuple[int, ...]:
    """The sequence's drafts, as many as may follow `num_tokens` known ones and have room. They are used up.

    Args:
        sequence: a running one.
        num_tokens: of its known tokens in the plan.
        budget: tokens that the plan may still hold besides them.
        max_len: most tokens of a sequence.
        allocator: gives the blocks; a guess is not worth a preemption.
    """
    drafts, sequence.draft_token_ids = sequence.draft_token_ids, ()
    if num_tokens < sequence.num_uncomputed:
        return ()  # not the end of what is known: nothing could be verified
    # The step samples one more token than there are drafts.
    room = min(sequence.request.max_tokens - sequence.num_outputs, max_len - sequence.num_known) - 1
    drafts = drafts[: max(min(room, budget), 0)]
    return drafts if drafts and allocator.grow(sequence, sequence.num_known + len(drafts)) else ()


def settle_drafts(sequence: Sequence, num_drafts: int, num_right: int) -> None:
    """A step has verified drafts: take back what was counted for those that were wrong."""
    sequence.num_pending_drafts -= num_drafts
    sequence.num_drafted += num_drafts
    sequence.num_accepted += num_right
    runs = sequence.accepted_runs
    runs += [0] * (num_drafts + 1 - len(runs))
    runs[num_right] += 1
    if sequence.status is SequenceStatus.RUNNING:  # a preempted one counts nothing as computed
        sequence.num_computed -= num_drafts - num_right
