"""`EngineCore`: the loop plan -> dispatch -> collect -> commit, one step ahead of the device.

    host    plan 1 | plan 2 . commit 1 | plan 3 . commit 2 | …
    device         [ step 1 ............][ step 2 .........][ step 3 …

While step N runs, the host plans and dispatches N+1 (the token that N samples stays on the device and feeds N+1
there), then reads N's tokens. With `async_scheduling=False` each step is read before the next is planned. One thread
drives a core; it is not thread-safe.

Where a sequence follows a grammar, what N+1 may sample depends on the token of N. The forward pass of N+1 needs no such
thing: it is dispatched as ever, and while it runs the host reads N, fills the masks and dispatches the sampling.

    host    forward 2 . commit 1 . masks . sample 2 | forward 3 . commit 2 . masks . sample 3 | …
    device  [ forward 2 ........................][s][ forward 3 ........................][s]
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from engine.errors import EngineDeadError, InvalidRequestError, QueueFullError
from engine.logprobs import add_logprobs, add_prompt_score
from engine.metrics import EngineStats
from engine.output_processor import OutputProcessor, RequestRecord, stamp
from engine.outputs import RequestOutput
from engine.requests.request import Request
from engine.requests.sequence import FinishReason, Sequence, SequenceStatus
from engine.runtime.executor import Executor, InFlightStep, StartedStep, StepResult
from engine.runtime.pooling import PooledPart
from engine.scheduling.plan import StepPlan
from engine.scheduling.results import CommittedToken
from engine.scheduling.scheduler import Scheduler
from engine.speculative.protocol import AnySpeculator
from engine.structured.compiler import GrammarCompiler
from engine.structured.masks import DeadEnd, MaskedRow, MaskFiller
from engine.structured.matcher import MatcherState
from engine.timeline import Timeline

logger = logging.getLogger("quire.core")
MOST_FAILURES_IN_A_ROW = 5  # whatever fails that often without one success between fails for ever


@dataclass(frozen=True)
class CoreOptions:
    """How the loop runs. Attributes: overlap: plan one step ahead of the device."""

    overlap: bool


class EngineCore:
    """Owns the scheduler, the executor and the records of live requests.

    Args:
        grammars: of structured outputs; None without a tokenizer.
        speculator: guesses tokens to come; None without speculative decoding.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        outputs: OutputProcessor,
        options: CoreOptions,
        grammars: GrammarCompiler | None = None,
        speculator: AnySpeculator | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.outputs = outputs
        self.stats = EngineStats()
        self.timeline = Timeline()
        self._failures_in_a_row = 0
        self.grammars = grammars
        self._speculator = speculator
        self._masks = (
            None if grammars is None else MaskFiller(grammars.vocab_size, grammars.num_tokens, grammars.eos_token_ids)
        )
        self._num_structured = 0  # live requests that follow a grammar
        self._options = options
        self._records: dict[str, RequestRecord] = {}
        self._in_flight: deque[tuple[InFlightStep, float]] = deque()  # and when each was dispatched
        self._collected_at = 0.0
        self._touched: dict[str, RequestRecord] = {}

    def add(self, request: Request) -> None:
        """Queue a request. Its grammar, if it has one, is compiled here unless that was done before
        (`GrammarCompiler.prepare`, `submit`).

        Raises:
            InvalidRequestError: its id is in use, or its grammar is at fault.
            ContextLengthError, QueueFullError: see `Scheduler.add`.
        """
        if request.request_id in self._records:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use by a live request.", "request_id")
        params = request.params
        sequences = [Sequence(request, index) for index in range(params.n)]
        for sequence in sequences:
            sequence.output_logprobs = None if params.logprobs is None else []
        if params.prompt_logprobs is not None:
            sequences[0].prompt_logprobs = [None]
        if params.structured_outputs is not None:
            assert self.grammars is not None, "the input processor refuses grammars without a tokenizer"
            for sequence in sequences:
                sequence.matcher = self.grammars.matcher(params.structured_outputs)
        try:
            self.scheduler.add(sequences)
        except QueueFullError:
            self.stats.num_rejected += 1
            raise
        self._num_structured += params.structured_outputs is not None
        self._records[request.request_id] = self.outputs.open(request, sequences)
        self.timeline.open(request, sequences)
        self.stats.on_arrival(request)

    def abort(self, request_id: str) -> bool:
        """End a request with finish reason "abort"; its last output comes with the next `step`. False if it is not
        live.
        """
        record = self._records.get(request_id)
        if record is None:
            return False
        self.scheduler.abort(request_id)
        self._touch(record)
        return True

    @property
    def has_work(self) -> bool:
        """True while `step` has something to do."""
        return bool(self._touched) or bool(self._in_flight) or self.scheduler.has_work

    def step(self) -> list[RequestOutput]:
        """Advance by one step.

        Returns:
            The outputs of requests that have something new to show.

        Raises:
            EngineDeadError: `MOST_FAILURES_IN_A_ROW` steps failed and none succeeded between them.
        """
        if self._speculator is not None:
            self._draft(self._speculator)
        self._dispatch_next()
        keep = 1 if self._options.overlap else 0
        # Nothing new to dispatch: read what is in flight, or the pipeline would never drain.
        if self._in_flight and (len(self._in_flight) > keep or not self._dispatched):
            self._collect_oldest()
        return self._drain()

    def _draft(self, speculator: AnySpeculator) -> None:
        """Give drafts to the sequences of the next step, if that pays. The host makes guesses from all tokens before
        them, so a step in flight is read first: that is the price of a step with drafts, and part of its time.
        """
        scheduler = self.scheduler
        if scheduler.may_admit or not speculator.wakes(scheduler.num_running):
            return
        decoding = [sequence for sequence in scheduler.running if sequence.wants_tokens]
        if not decoding or any(sequence.num_uncomputed > 1 for sequence in decoding):
            return
        num_drafts = speculator.pays(decoding)
        if num_drafts and speculator.must_read(decoding):
            while self._in_flight:
                self._collect_oldest()
            decoding = [sequence for sequence in scheduler.running if sequence.wants_tokens]
            num_drafts = speculator.pays(decoding) if decoding else 0
        if num_drafts:
            speculator.give(decoding, num_drafts)

    def _dispatch_next(self) -> None:
        self._dispatched = False
        started = time.perf_counter()
        plan = self.scheduler.plan()
        planned = time.perf_counter()
        if plan is None:
            return
        read_before = self.stats.collect_s + self.stats.commit_s
        now = time.monotonic()
        for item in plan.items:
            if item.sequence.scheduled_ts is None:
                item.sequence.scheduled_ts = now
        try:
            step = self._dispatch(plan)
        except Exception as error:
            self._fail_dispatch(plan, error)
            return
        if step is None:
            return
        # Before a step with drafts the last one was read, if they are made on the host: what came between is its time.
        drained = step.bucket.num_logits > 1 and not self._in_flight
        self._in_flight.append((step, self._collected_at if drained else now))
        self._dispatched = True
        reading = self.stats.collect_s + self.stats.commit_s - read_before
        dispatch_s = time.perf_counter() - planned - reading
        self.timeline.on_dispatch(plan, now, step.bucket.num_tokens)
        self.stats.on_dispatch(plan, step.bucket.num_tokens, planned - started, dispatch_s)

    def _dispatch(self, plan: StepPlan) -> InFlightStep | None:
        """Start a step; None if an earlier one failed meanwhile, which voids this one."""
        if self._num_structured == 0:
            return self.executor.dispatch(plan)
        constrained = [item for item in plan.items if item.samples and item.sequence.matcher is not None]
        if not constrained:
            return self.executor.dispatch(plan)
        started, failed_before = self.executor.forward(plan), self.stats.num_failed_steps
        # More than this step's own token is pending: a step in flight holds one that the matcher must see first.
        while self._in_flight and any(item.sequence.num_pending > 1 + len(item.drafts) for item in constrained):
            self._collect_oldest()
        if self.stats.num_failed_steps > failed_before:
            return None
        return self.executor.sample(started, self._make_mask(plan, started))

    def _make_mask(self, plan: StepPlan, started: StartedStep) -> np.ndarray | None:
        """int32[S * L, W] of rows that follow a grammar; None if all have ended. Ends those for which nothing is left.

        Args:
            plan: the step.
            started: with L rows of logits of each sequence.
        """
        assert self._masks is not None
        bucket = started.bucket
        rows = [
            MaskedRow(index * bucket.num_logits, item.sequence.matcher, item.sequence.request, started.drafts(index))
            for index, item in enumerate(plan.items)
            if item.samples and item.sequence.matcher is not None and not item.sequence.finished
        ]
        if not rows:
            return None
        mask, dead_ends = self._masks.fill(rows, bucket.num_logit_rows)
        for end in dead_ends:
            self._end_grammar(plan.items[end.index // bucket.num_logits].sequence, end)
        return mask

    def _end_grammar(self, sequence: Sequence, end: DeadEnd, num_outputs: int | None = None) -> None:
        record = self._records[sequence.request.request_id]
        if end.complete:
            self.scheduler.finish(sequence, FinishReason.STOP, num_outputs=num_outputs)
        else:
            record.error = f"structured_outputs: {end.error}."
            for other in record.sequences:
                self.scheduler.finish(other, FinishReason.ERROR)
        self._touch(record)

    def _fail_dispatch(self, plan: StepPlan, error: Exception) -> None:
        """Steps before this one are sound: read them first. If that fails as well, it has voided this plan already."""
        failed_before = self.stats.num_failed_steps
        while self._in_flight:
            self._collect_oldest()
        if self.stats.num_failed_steps == failed_before:
            self._fail(plan, error)

    def _collect_oldest(self) -> None:
        step, dispatched = self._in_flight[0]
        started = time.perf_counter()
        try:
            result = self.executor.collect(step)
        except Exception as error:
            self._in_flight.clear()  # later steps built on this one
            self._fail(step.plan, error)
            return
        self._in_flight.popleft()
        self._failures_in_a_row = 0
        now = time.monotonic()
        self.timeline.on_collected(step.plan.step_id, now)
        # The device took it up when it was dispatched, or when it was done with the one before.
        seconds, shape = now - max(dispatched, self._collected_at), step.bucket
        if self.scheduler.pace is not None and shape.num_logits == 1:
            self.scheduler.pace.observe(shape.num_tokens, seconds)
        if self._speculator is not None:
            self._speculator.observe_time(shape.num_tokens, shape.num_seqs, seconds, shape.num_logits - 1)
        self._collected_at = now
        collected = time.perf_counter()
        self._commit(result)
        self.stats.on_commit(collected - started, time.perf_counter() - collected)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """A step raised: its requests end with an error, the device state is made anew, all others are recomputed.

        Raises:
            EngineDeadError: too many steps in a row failed.
        """
        logger.error("step %d failed: %s", plan.step_id, describe_plan(plan), exc_info=error)
        for sequence in self.scheduler.fail(plan):
            record = self._records[sequence.request.request_id]
            record.error = f"a step of the engine failed: {type(error).__name__}: {error}"
            self._touch(record)
        self.executor.reset_state()
        self.stats.num_failed_steps += 1
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= MOST_FAILURES_IN_A_ROW:
            raise EngineDeadError(
                f"{self._failures_in_a_row} steps of the engine failed one after another, the last one with "
                f"{type(error).__name__}: {error}"
            ) from error

    def _commit(self, result: StepResult) -> None:
        for score in result.prompt_scores:
            add_prompt_score(score, self.outputs.describe)
        for part in result.pooled:
            self._commit_pooled(part)
        if result.plan.most_drafts:
            self.stats.on_drafts(result.plan, result.tokens)
        cut: Sequence | None = None  # ended by a token that was not the last of this step
        now, records, stats, touched = time.monotonic(), self._records, self.stats, self._touched
        for committed in self.scheduler.commit(result.plan, result.tokens):
            sequence = committed.sequence
            if sequence is cut:
                continue
            request_id = sequence.request.request_id
            record = records[request_id]
            if sequence.first_token_ts is None:
                stats.on_first_token(sequence)
            stats.generation_tokens += 1
            stamp(sequence, now)
            if sequence.output_logprobs is not None:
                row = committed.item * result.num_logits + committed.place
                add_logprobs(sequence, committed.token_id, row, result, self.outputs.describe)
            if self._ends(record, committed):
                cut = sequence
            touched[request_id] = record
        if self._speculator is not None:
            self._note_tokens(self._speculator, result)

    def _note_tokens(self, speculator: AnySpeculator, result: StepResult) -> None:
        for item, tokens in zip(result.plan.items, result.tokens, strict=True):
            sequence = item.sequence
            # One that lost its row, or is being pooled, drafts nothing.
            if item.samples and sequence.status is SequenceStatus.RUNNING and sequence.request.pooling is None:
                speculator.on_tokens(sequence, tokens, len(item.drafts))

    def _ends(self, record: RequestRecord, committed: CommittedToken) -> bool:
        """Feed a token that was just committed to text and grammar; ends the sequence if they say so."""
        sequence, token, _, _, _, ends = committed
        matcher, reason = sequence.matcher, sequence.finish_reason if ends else None
        stop = self.outputs.push(record, sequence, token, ends, reason is FinishReason.STOP)
        if stop is not None:
            self.scheduler.finish(sequence, FinishReason.STOP, stop, committed.num_outputs)
        elif matcher is None or reason not in (None, FinishReason.LENGTH):
            return committed.ends
        else:
            matcher.accept((token,))
            state = matcher.state
            if state is MatcherState.OPEN:
                return committed.ends
            end = DeadEnd(-1, True, "") if state is MatcherState.COMPLETE else DeadEnd(-1, False, matcher.error)
            self._end_grammar(sequence, end, committed.num_outputs)
        return True

    def _commit_pooled(self, part: PooledPart) -> None:
        """Add to a sum, before the scheduler ends the sequence. A sum that begins anew forgets what was before."""
        if part.sequence.finished:
            return
        record = self._records[part.sequence.request.request_id]
        record.pooled = part.total if part.start == 0 or record.pooled is None else record.pooled + part.total
        if part.is_last:
            self.stats.on_first_token(part.sequence)
            self._touch(record)

    def _touch(self, record: RequestRecord) -> None:
        self._touched[record.request.request_id] = record

    def _drain(self) -> list[RequestOutput]:
        ready: list[RequestOutput] = []
        for request_id, record in self._touched.items():
            output = self.outputs.output(record)
            if output is not None:
                ready.append(output)
            if record.finished:
                self._records.pop(request_id, None)
                self.timeline.close(record.request, time.monotonic())
                if self._speculator is not None:
                    for sequence in record.sequences:
                        self._speculator.forget(sequence)
                self._num_structured -= record.request.params.structured_outputs is not None
                self.stats.on_finish(record.sequences)
        self._touched.clear()
        return ready


def describe_plan(plan: StepPlan) -> str:
    """What a step was to compute, for the log: `req-3[0]: 17 + 5` means five tokens from position 17 on."""
    return ", ".join(
        f"{item.sequence.request.request_id}[{item.sequence.index}]: {item.start} + {item.num_tokens}"
        for item in plan.items
    )
