"""What the scheduler gives out besides plans. Frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.requests.sequence import Sequence


class CommittedToken(NamedTuple):
    """A token that a sequence got.

    Attributes:
        sequence: whose; `finish_reason` is set if the token was its last.
        token_id: already in `sequence.output_token_ids`, and so are those that the same step gave after it.
        item: position of the sequence in `plan.items`.
        place: which of the tokens that the sequence got in the step, from 0.
        num_outputs: outputs up to this one.
        ends: whether this token is the sequence's last.
    """

    sequence: Sequence
    token_id: int
    item: int
    place: int
    num_outputs: int
    ends: bool


@dataclass(frozen=True)
class SchedulerStats:
    """A snapshot for the metrics. Token and preemption counters only grow.

    Attributes:
        num_running: sequences that own a row.
        num_waiting: sequences that do not, preempted ones included.
        num_queued_reqs: requests of which no sequence was admitted yet.
        num_in_flight: plans not committed yet.
        kv_cache_usage: fraction of the blocks that sequences hold, 0 to 1.
        num_free_blocks: blocks that no sequence holds.
        num_preemptions: how often a sequence lost its blocks.
        num_prefix_queried_tokens: tokens that were looked up in the prefix cache at first admissions.
        num_prefix_hit_tokens: those of them that were found.
    """

    num_running: int
    num_waiting: int
    num_queued_reqs: int
    num_in_flight: int
    kv_cache_usage: float
    num_free_blocks: int
    num_preemptions: int
    num_prefix_queried_tokens: int
    num_prefix_hit_tokens: int
