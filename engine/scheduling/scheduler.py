"""`Scheduler`: one loop that gives every sequence some tokens, so that computed catches up with known."""

from __future__ import annotations

import collections.abc as abc
from collections import deque

from engine.requests.sequence import FinishReason, Sequence, SequenceStatus
from engine.scheduling import invariants
from engine.scheduling.allocator import KVAllocator
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.drafts import settle_drafts, take_drafts
from engine.scheduling.groups import RequestGroups
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.pace import NO_LIMIT, PromptPace
from engine.scheduling.plan import ScheduledSequence, StepPlan
from engine.scheduling.policy import ORDER_KEYS, SequenceQueue
from engine.scheduling.results import CommittedToken, SchedulerStats
from engine.scheduling.stopping import find_stop


class Scheduler:
    """Decides what each step computes, and keeps the records when its tokens come back.

    Any number of plans may be in flight: `plan()` counts the tokens of its plan as computed, and the token that a
    sequence samples as known (*pending*: it is on the device, in the sequence's row), so the next plan builds on it
    before the host has read it. Plans must run on the device in order and be committed in order. A caller that reads
    block tables from a plan does so before the next call of the scheduler. Not thread-safe: one thread owns it.

    A sequence ends with reason "length" at `max_len` tokens: `max_model_len`, or what the whole pool can compute if
    that is less. `pace` holds prompts back while streams decode, if it is given.
    """

    def __init__(self, limits: SchedulerLimits, pool: BlockPool, pace: PromptPace | None = None) -> None:
        self._limits = limits
        self.pace = pace
        self._allocator = KVAllocator(pool, limits.block_size)
        # The last token of a sequence needs no room: nothing is sampled after it.
        self.max_len = min(limits.max_model_len, self._allocator.capacity_tokens + 1)
        self._groups = RequestGroups(limits, self._allocator.capacity_tokens)
        self._running = SequenceQueue(ORDER_KEYS[limits.policy])
        self._waiting = SequenceQueue(ORDER_KEYS[limits.policy])
        self._free_rows = list(reversed(range(limits.max_num_seqs)))
        self._in_flight: deque[StepPlan] = deque()
        self._num_arrivals = 0
        self._num_plans = 0
        self._num_preemptions = 0

    # --------------------------------------------------------------------------------------------- requests come and go

    def add(self, sequences: abc.Sequence[Sequence]) -> None:
        """Queue the n sequences of one request, in order of their index.

        Raises:
            InvalidRequestError: a live request has the same id.
            ContextLengthError: the prompt can never run.
            QueueFullError: too many requests or prompt tokens wait already.
        """
        self._groups.add(tuple(sequences))
        for sequence in sequences:
            sequence.arrival = self._num_arrivals
            self._num_arrivals += 1
            sequence.most_known = sequence.num_prompt_tokens + sequence.request.max_tokens
            if sequence.request.pooling is None:  # a pooled prompt may be as long as a sequence can be: nothing follows
                sequence.most_known = min(sequence.most_known, self.max_len)
            self._waiting.add(sequence)

    def abort(self, request_id: str) -> list[Sequence]:
        """End a request with reason "abort". Returns the sequences that it ended, if any were left."""
        group = self._groups.find(request_id)
        ended = [sequence for sequence in group.sequences if not sequence.finished] if group else []
        for sequence in reversed(ended):  # the end of a long queue is the cheap one to remove from
            self._end(sequence, FinishReason.ABORT)
        return ended

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        num_outputs: int | None = None,
    ) -> None:
        """End one sequence for a reason that only the caller can see, such as a stop string.

        Its tokens in flight are dropped, and outputs beyond `num_outputs` (None = all stay), which a step gave along
        with the one that ends it. If it has ended already its reason stays, unless that came with a later output; but a
        stop goes before "length": a stop string may be completed by the very token that reaches `max_tokens`, and then
        the user is told of the stop string, as by vLLM.
        """
        is_earlier = num_outputs is not None and num_outputs < len(sequence.output_token_ids)
        if is_earlier:
            del sequence.output_token_ids[num_outputs:]
        if not sequence.finished:
            self._end(sequence, reason, stop_reason)
        elif is_earlier or (sequence.finish_reason is FinishReason.LENGTH and reason is FinishReason.STOP):
            sequence.finish_reason, sequence.stop_reason = reason, stop_reason

    # --------------------------------------------------------------------------------------------------------- planning

    def plan(self) -> StepPlan | None:
        """What the next step computes; None if there is nothing, or nothing before a plan in flight is committed."""
        items: list[ScheduledSequence] = []
        preempted: list[Sequence] = []
        most = NO_LIMIT if self.pace is None else self.pace.allow(self._running, self.may_admit)
        budget = self._plan_running(items, preempted, most)
        # While running sequences lose blocks, newcomers would only take more. Steps that verify drafts have a shape of
        # their own, without room for a prompt.
        if budget > 0 and self._waiting and self._free_rows and not preempted and not any(i.drafts for i in items):
            self._plan_waiting(items, budget)
        if not items:
            return None
        plan = StepPlan(self._num_plans, tuple(items), tuple(preempted))
        self._num_plans += 1
        self._in_flight.append(plan)
        return plan

    def _plan_running(self, items: list[ScheduledSequence], preempted: list[Sequence], prompt_tokens: int) -> int:
        """Give tokens to running sequences, in order, preempting from the end. Returns what is left for newcomers."""
        running, grow, block_size = self._running, self._allocator.grow, self._limits.block_size
        budget, most = self._limits.max_num_batched_tokens, self._limits.max_tokens_per_seq
        for sequence in running:  # its end may be preempted meanwhile, which a list's iterator allows
            if budget == 0:
                break
            stop = sequence.num_known
            if stop >= sequence.most_known:
                continue
            num_tokens, samples = stop - sequence.num_computed, True
            if num_tokens > 1:
                whole, num_tokens = num_tokens, min(num_tokens, most, budget, prompt_tokens)
                if num_tokens == 0:
                    continue
                samples, stop = num_tokens == whole, sequence.num_computed + num_tokens
                prompt_tokens -= num_tokens
            while stop > len(sequence.block_table) * block_size and not grow(sequence, stop):
                # The last one is never before this one, so it is not in this plan yet; at worst it is this one.
                victim = running[-1]
                self._preempt(victim)
                preempted.append(victim)
                if victim is sequence:
                    return budget
            drafts = ()
            if sequence.draft_token_ids:
                drafts = take_drafts(sequence, num_tokens, budget - num_tokens, self.max_len, self._allocator)
            items.append(self._give(sequence, num_tokens, samples, False, drafts))
            budget -= num_tokens + len(drafts)
        return min(budget, prompt_tokens)

    def _plan_waiting(self, items: list[ScheduledSequence], budget: int) -> None:
        """Admit waiting sequences, in order, while rows, blocks and budget last."""
        waiting = self._waiting
        num_promised = sum(self._allocator.num_missing(s) for s in self._running if s.num_known < s.most_known)
        index = 0
        while index < len(waiting) and budget > 0 and self._free_rows:
            sequence = waiting[index]
            # Preempted with tokens in flight: their values are needed on the host, since its row is gone.
            if sequence.num_pending or not self._groups.of(sequence).may_start(sequence):
                index += 1
                continue
            item = self._admit(sequence, budget, num_promised)
            if item is None:
                return  # nobody overtakes: a long prompt would starve behind short ones
            items.append(item)
            budget -= item.num_tokens
            num_promised += self._allocator.num_missing(sequence)

    def _admit(self, sequence: Sequence, budget: int, num_promised: int) -> ScheduledSequence | None:
        """Move one waiting sequence to a row; None, with nothing changed, if blocks or budget do not suffice."""
        limits, allocator, group = self._limits, self._allocator, self._groups.of(sequence)
        cached = allocator.find_cached(sequence, group.root) if group.reads_cache else []
        num_cached_tokens = len(cached) * limits.block_size
        num_uncomputed = sequence.num_known - num_cached_tokens
        num_tokens = min(num_uncomputed, limits.max_tokens_per_seq, budget)
        # Without chunks it must be all or nothing. Only a recomputation after preemption can be longer than the whole
        # budget (`add` refuses such prompts); it is split after all, as it could never run otherwise.
        if not limits.enable_chunked_prefill and num_tokens < num_uncomputed <= limits.max_num_batched_tokens:
            return None
        if not allocator.fits(sequence, cached, num_promised):
            return None
        allocator.place(sequence, cached)
        allocator.grow(sequence, sequence.num_computed + num_tokens)  # it fits
        if sequence.status is SequenceStatus.WAITING:
            sequence.num_cached_tokens = num_cached_tokens
            if group.reads_cache:
                allocator.pool.count_lookup(sequence.num_known, num_cached_tokens)
        self._waiting.remove(sequence)
        self._running.add(sequence)
        self._groups.note_admitted(group)
        sequence.status = SequenceStatus.RUNNING
        sequence.row = self._free_rows.pop()
        return self._give(sequence, num_tokens, num_tokens == sequence.num_uncomputed, True, ())

    def _give(
        self, sequence: Sequence, num_tokens: int, samples: bool, starts_row: bool, drafts: tuple[int, ...]
    ) -> ScheduledSequence:
        """Count known tokens and drafts as computed; the blocks for them are there."""
        row, start, num_sent_blocks, is_relative = sequence.row, sequence.num_computed, sequence.num_sent_blocks, False
        assert row is not None, "only running sequences get tokens"
        if drafts or sequence.num_pending_drafts:
            num_tokens += len(drafts)
            is_relative = sequence.num_pending_drafts > 0
            sequence.num_pending_drafts += len(drafts)
        sequence.num_computed = stop = start + num_tokens
        if samples:
            sequence.num_pending += 1 + len(drafts)
        sequence.num_sent_blocks = len(sequence.block_table)
        if stop // self._limits.block_size > sequence.num_cached_blocks:  # not so in all but a few of the steps
            self._register_fixed(sequence)
        return ScheduledSequence(
            sequence, row, start, num_tokens, samples, num_sent_blocks, starts_row, drafts, is_relative
        )

    def _register_fixed(self, sequence: Sequence) -> None:
        self._allocator.register_fixed(sequence, self._groups.of(sequence).root)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue: what it computed is forgotten, what it knows is not, and tokens in flight still come."""
        self._leave_row(sequence)
        sequence.status = SequenceStatus.PREEMPTED
        sequence.draft_token_ids = ()
        sequence.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting.add(sequence)

    def _leave_row(self, sequence: Sequence) -> None:
        assert sequence.row is not None, "only running sequences own a row"
        self._running.remove(sequence)
        self._allocator.release(sequence)
        self._free_rows.append(sequence.row)
        sequence.row = None

    # ------------------------------------------------------------------------------------------------- after the device

    def commit(self, plan: StepPlan, sampled: abc.Sequence[abc.Sequence[int]]) -> list[CommittedToken]:
        """Deliver what the oldest plan in flight sampled.

        Args:
            plan: the oldest plan in flight.
            sampled: one entry per item of the plan: the drafts that were right, and the token sampled after them;
                ignored (empty, say) where the item does not sample.

        Returns:
            The tokens that sequences got, in the order of the items. Tokens of sequences that ended meanwhile are
            dropped.

        Raises:
            ValueError: the plan is not the oldest in flight, or `sampled` has not its length, or lacks a token.
        """
        if not self._in_flight or self._in_flight[0] is not plan:
            raise ValueError(f"plan {plan.step_id} is not the oldest in flight: {[p.step_id for p in self._in_flight]}")
        if len(sampled) != len(plan.items):
            raise ValueError(f"plan {plan.step_id} has {len(plan.items)} items, but {len(sampled)} tokens came")
        self._in_flight.popleft()
        committed: list[CommittedToken] = []
        block_size = self._limits.block_size
        finished, max_len = SequenceStatus.FINISHED, self.max_len
        for index, (item, tokens) in enumerate(zip(plan.items, sampled, strict=True)):
            sequence, _, _, _, samples, _, _, drafts, _ = item
            if not samples or sequence.status is finished:
                continue
            num_drafts = len(drafts)
            if not 1 <= len(tokens) <= 1 + num_drafts:
                raise ValueError(
                    f"plan {plan.step_id}: item {index} samples after {num_drafts} drafts, and {len(tokens)} tokens "
                    "came"
                )
            sequence.num_pending -= 1 + num_drafts
            if num_drafts:
                settle_drafts(sequence, num_drafts, len(tokens) - 1)
            if sequence.request.pooling is not None:  # its prompt is computed: that was all
                self._end(sequence, FinishReason.STOP)
                continue
            outputs, stop = sequence.output_token_ids, None
            for place, token in enumerate(tokens):
                outputs.append(token)
                stop = find_stop(sequence, max_len)
                committed.append(CommittedToken(sequence, token, index, place, len(outputs), stop is not None))
                if stop is not None:
                    break
            if sequence.num_computed // block_size > sequence.num_cached_blocks:
                self._register_fixed(sequence)  # a block of which the last token was the last unknown one
            if stop is not None:
                self._end(sequence, *stop)
        return committed

    def fail(self, plan: StepPlan) -> list[Sequence]:
        """A step raised: what its plan and all later ones left in the cache cannot be trusted.

        Sequences in the plan end with reason "error". Later plans are void and must not be committed. All other running
        sequences are recomputed from their tokens, and the prefix cache is dropped, so the caller may rebuild the
        device state from nothing. Plans before this one stay in flight.

        Returns:
            The sequences that ended.

        Raises:
            ValueError: the plan is not in flight.
        """
        position = next((i for i, other in enumerate(self._in_flight) if other is plan), None)
        if position is None:
            raise ValueError(f"plan {plan.step_id} is not in flight: {[p.step_id for p in self._in_flight]}")
        ended = [item.sequence for item in plan.items if not item.sequence.finished]
        for sequence in ended:
            self._end(sequence, FinishReason.ERROR)
        while len(self._in_flight) > position:
            void = self._in_flight.pop()
            for item in void.items:
                if item.samples and not item.sequence.finished:
                    item.sequence.num_pending -= 1 + len(item.drafts)
                    item.sequence.num_pending_drafts -= len(item.drafts)
        for sequence in list(self._running):
            self._preempt(sequence)
        self.reset_prefix_cache()
        return ended

    def reset_prefix_cache(self) -> None:
        """Forget which blocks hold which content. Running sequences go on undisturbed."""
        self._allocator.pool.reset_prefix_cache()

    def _end(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """The one way out of the scheduler."""
        if sequence.status is SequenceStatus.RUNNING:
            self._leave_row(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        sequence.num_pending = sequence.num_pending_drafts = 0  # what is in flight will be dropped
        self._groups.note_finished(sequence)

    # --------------------------------------------------------------------------------------------------- looking inside

    @property
    def has_work(self) -> bool:
        """True while a sequence is not finished. Plans may be in flight even if not: their tokens will be dropped."""
        return len(self._groups) > 0

    @property
    def may_admit(self) -> bool:
        """Whether sequences wait for which there is a row."""
        return bool(self._waiting) and bool(self._free_rows)

    @property
    def running(self) -> abc.Iterable[Sequence]:
        """Sequences with a row, in the order in which they get tokens."""
        return self._running

    @property
    def num_running(self) -> int:
        """Sequences that own a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that own none, preempted ones included."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Plans not committed yet."""
        return len(self._in_flight)

    def stats(self) -> SchedulerStats:
        """A snapshot for the metrics."""
        pool = self._allocator.pool
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_queued_reqs=self._groups.num_queued_reqs,
            num_in_flight=len(self._in_flight),
            kv_cache_usage=pool.usage,
            num_free_blocks=pool.num_free,
            num_preemptions=self._num_preemptions,
            num_prefix_queried_tokens=pool.num_queried_tokens,
            num_prefix_hit_tokens=pool.num_hit_tokens,
        )

    def check_invariants(self) -> None:
        """Prove that nothing leaked and nothing is shared wrongly. Slow: proportional to pool and queue.

        Raises:
            AssertionError: with what is wrong.
        """
        running, waiting, pool = list(self._running), list(self._waiting), self._allocator.pool
        pool.check_invariants([sequence.block_table for sequence in running])
        self._running.check_invariants()
        self._waiting.check_invariants()
        for sequence in running:
            invariants.check_running(sequence, pool, self._limits.block_size)
        for sequence in waiting:
            invariants.check_waiting(sequence)
        invariants.check_rows(running, self._free_rows, self._limits.max_num_seqs)
        invariants.check_pending(self._in_flight, [*running, *waiting])
        queued = (self._groups.num_queued_reqs, self._groups.num_queued_tokens)
        invariants.check_groups(self._groups, queued, len(running) + len(waiting))
