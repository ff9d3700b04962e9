"""`Executor`: holds weights, device state and executables; dispatches a `StepPlan`, collects what it sampled.

Dispatch returns at once: XLA runs in the background, the host plans the next step meanwhile and collects this one
later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from engine.requests.sequence import Sequence
from engine.runtime.buckets import Bucket
from engine.runtime.device_state import SampleState
from engine.runtime.drafting.drafter import DeviceView
from engine.runtime.executables import TABLE_UPDATES, ModelProgram
from engine.runtime.lookup import Executables
from engine.runtime.packing import UPDATE_WIDTH, block_updates, pack_step
from engine.runtime.pooling import PooledGroup, PooledPart, pool_step
from engine.runtime.sampling import (
    NUM_TOP,
    LogprobArrays,
    SampledTokens,
    SamplerVariant,
    choose_variant,
    needs_state,
    pack_params,
    padding_params,
    reset_row,
)
from engine.runtime.sampling import pack_step as pack_sampling
from engine.runtime.sampling.inputs import WIDTH
from engine.runtime.step import PROMPT_LOGPROB_ROWS
from engine.scheduling.plan import ScheduledSequence, StepPlan
from models.functional import Params


@dataclass(frozen=True)
class PromptScore:
    """Logprobs of a part of one sequence's prompt.

    Attributes:
        sequence: whose prompt.
        first: position of the first target token.
        count: targets, at most `PROMPT_LOGPROB_ROWS`.
        scores: of the targets, as numpy arrays.
        full: float32[C, V] if the request asks for more candidates than the sampler returns.
    """

    sequence: Sequence
    first: int
    count: int
    scores: LogprobArrays
    full: np.ndarray | None


class StartedStep(NamedTuple):
    """A step whose forward pass was dispatched and whose sampling was not. A tuple: one is made in every step.

    Attributes:
        plan: the step.
        bucket: T tokens, S sequences.
        variant: of the sampler.
        logits: float32[S * L, V], of each sequence's last token, and in verify buckets of its drafts.
        hidden: [T, E] after the final norm.
        sampling: int32[S, W], sampling parameters; in verify buckets with drafts behind them.
        draft_ids: int32[S, K] that the device guessed itself.
    """

    plan: StepPlan
    bucket: Bucket
    variant: SamplerVariant
    logits: jax.Array
    hidden: jax.Array
    sampling: jax.Array
    draft_ids: jax.Array | None = None

    def drafts(self, index: int) -> tuple[int, ...]:
        """Drafts of the plan's item at `index`; waits for the device if it makes them."""
        drafts = self.plan.items[index].drafts
        if self.draft_ids is None or not drafts:
            return drafts
        return tuple(np.asarray(self.draft_ids)[index, : len(drafts)].tolist())


@dataclass(frozen=True)
class InFlightStep:
    """A dispatched step. Its arrays are promises until `Executor.collect`.

    Attributes:
        plan: the step.
        sampled: what was sampled, per row of logits of the bucket.
        logits: float32[S * L, V], masked by grammars, if a sampling sequence asks for more candidates than the sampler
            returns.
        hidden: [T, E] if a sequence asks for the logprobs of its prompt.
        bucket: the shape that it runs in.
        pooled: sums of hidden states of the pooled sequences.
    """

    plan: StepPlan
    sampled: SampledTokens
    logits: jax.Array | None
    hidden: jax.Array | None
    bucket: Bucket
    pooled: tuple[PooledGroup, ...]


@dataclass(frozen=True)
class StepResult:
    """What a step gave, as numpy arrays.

    Attributes:
        plan: the step.
        tokens: per item of the plan, the tokens that it got; meaningful where the item samples.
        num_logits: rows of each item in `sampled` and `full_logprobs`.
        sampled: all of the sampler's outputs.
        full_logprobs: float32[S * L, V] or None.
        prompt_scores: parts of prompts that were scored.
        pooled: parts of the sums of pooled sequences.
    """

    plan: StepPlan
    tokens: list[list[int]]
    num_logits: int
    sampled: SampledTokens
    full_logprobs: np.ndarray | None
    prompt_scores: tuple[PromptScore, ...]
    pooled: tuple[PooledPart, ...]


def needs_full_logprobs(asked: int | None) -> bool:
    """True if more candidates are asked for than the sampler returns anyway."""
    return asked is not None and (asked == -1 or asked > NUM_TOP)


def _log_softmax(logits: jax.Array) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return (wide - np.log(np.exp(wide).sum(-1, keepdims=True))).astype(np.float32)


class Executor:
    """Runs steps. One thread drives it.

    Attributes:
        executables: what runs.
    """

    def __init__(self, program: ModelProgram, params: Params, executables: Executables) -> None:
        self.program = program
        self._params = params
        self.executables = executables
        self._row_params = np.zeros((program.limits.max_num_seqs + 1, WIDTH), np.int32)  # per row of the device state
        self._row_params[-1] = padding_params()
        self._unusual_rows: set[int] = set()  # of sequences that are pooled, or whose prompt is scored
        self._drafter = program.drafter
        self._buckets = program.buckets
        self._layouts = {bucket: program.layout(bucket) for bucket in self._buckets.all()}
        self._forward_state, self._sample_state = program.make_state()
        self._draft_state = program.make_draft_state()

    def reset_state(self) -> None:
        """Make the device state anew, after a step raised and may have lost it. KV blocks and rows start empty."""
        # Free the old state first: two caches may not fit.
        jax.tree.map(lambda array: array.delete(), (self._forward_state, self._sample_state, self._draft_state))
        self._forward_state, self._sample_state = self.program.make_state()
        if self._drafter is not None:
            self._drafter.forget_all()
            self._draft_state = self.program.make_draft_state()

    def dispatch(self, plan: StepPlan) -> InFlightStep:
        """Start one step and return at once."""
        return self.sample(self.forward(plan))

    def forward(self, plan: StepPlan, bucket: Bucket | None = None) -> StartedStep:
        """Start the forward pass of one step and return at once. `sample` must follow before the next step's.

        Args:
            bucket: the shape to run in; None = the cheapest that holds the step and is there.
        """
        if bucket is None:
            bucket = self.executables.choose(self._buckets, plan.num_tokens, len(plan.items), plan.most_drafts)
        layout = self._layouts[bucket]
        for item in plan.items:
            if item.starts_row:
                self._start_row(item)
        updates = block_updates(plan.items)
        updates, overflow = updates[: layout.num_updates], updates[layout.num_updates :]
        for start in range(0, len(overflow), TABLE_UPDATES):
            self._update_tables(overflow[start : start + TABLE_UPDATES])
        sampling_rows = pack_sampling(self._row_params, self._sampling_rows(plan, bucket.num_seqs))
        packed = pack_step(plan, layout, updates, sampling_rows)
        variant = choose_variant(sampling_rows)
        if self._drafter is not None:
            self._prepare_drafts(plan)
        started = self._forward(plan, bucket, variant, packed)
        if started.draft_ids is not None and any(item.sequence.matcher is not None for item in plan.items):
            started.draft_ids.copy_to_host_async()  # a grammar must see them
        return started

    def _prepare_drafts(self, plan: StepPlan) -> None:
        assert self._drafter is not None
        program = self.program
        tables, known = self._forward_state.block_tables, self._sample_state.rows
        device = DeviceView(tables, known, self._buckets, program.layout, self.executables.of_drafter)
        self._draft_state = self._drafter.prepare(plan, self._draft_state, device)

    def _forward(self, plan: StepPlan, bucket: Bucket, variant: SamplerVariant, packed: np.ndarray) -> StartedStep:
        """Drafts, if the device makes them, then the forward pass."""
        drafter, known, draft_ids = self._drafter, self._sample_state.rows, None
        if drafter is not None and bucket.num_logits > 1:
            draft_ids, self._forward_state, self._draft_state = self.executables.draft(bucket, variant)(
                drafter.weights, self._forward_state, self._draft_state, known, packed
            )
        hidden, logits, sampling, self._forward_state, streams = self.executables.forward(bucket)(
            self._params, self._forward_state, known, packed, draft_ids
        )
        if drafter is not None and drafter.observes:
            tables = self._forward_state.block_tables
            seen = hidden if streams is None else streams
            self._draft_state = self.executables.observe(bucket)(
                drafter.weights, self._draft_state, tables, known, packed, draft_ids, seen
            )
        return StartedStep(plan, bucket, variant, logits, hidden, sampling, draft_ids)

    def sample(self, started: StartedStep, mask: np.ndarray | None = None) -> InFlightStep:
        """Start the sampling of a step and return at once.

        Args:
            started: whose forward pass runs.
            mask: int32[S * L, W], a bit per token, if a sequence follows a grammar; not changed afterwards, since the
                device may read it in place.
        """
        plan, logits, hidden = started.plan, started.logits, started.hidden
        if mask is not None:
            logits = self.executables.mask(started.bucket.num_logit_rows)(logits, mask)
        if started.bucket.num_logits > 1:
            sample = self.executables.verify(started.bucket, started.variant)
        else:
            sample = self.executables.sample(started.bucket.num_seqs, started.variant)
        sampled, self._sample_state = sample(logits, started.sampling, self._sample_state)
        asked = started.variant is SamplerVariant.FULL and any(
            i.samples and needs_full_logprobs(i.sequence.request.params.logprobs) for i in plan.items
        )
        scores, pooled = False, ()
        if self._unusual_rows:
            scores = any(i.sequence.prompt_logprobs is not None for i in plan.items)
            pooled = pool_step(plan, hidden, self.executables.pool)
        for array in jax.tree.leaves(sampled):
            array.copy_to_host_async()
        return InFlightStep(
            plan, sampled, logits if asked else None, hidden if scores else None, started.bucket, pooled
        )

    def run_empty(self, bucket: Bucket) -> SampledTokens:
        """Run a step of padding, which changes nothing that is ever read: to learn how long it takes."""
        layout, variant = self._layouts[bucket], SamplerVariant.GREEDY
        sampling = pack_sampling(self._row_params, np.full(bucket.num_seqs, self.program.limits.max_num_seqs, np.int32))
        packed = pack_step(StepPlan(-1, ()), layout, (), sampling)
        # Each sequence as long as the shape allows, so that all rows are computed.
        rows = bucket.num_tokens // bucket.num_seqs
        views = layout.views(packed)
        views["num_seqs"][0] = bucket.num_seqs
        views["query_start"][:] = np.arange(bucket.num_seqs + 1) * rows
        views["context_lens"][:] = rows
        many = bucket.num_logits > 1
        if many:
            views["num_drafts"][:] = bucket.num_logits - 1
        started = self._forward(StepPlan(-1, ()), bucket, variant, packed)
        sample = self.executables.verify(bucket, variant) if many else self.executables.sample(bucket.num_seqs, variant)
        sampled, self._sample_state = sample(started.logits, started.sampling, self._sample_state)
        return sampled

    def collect(self, step: InFlightStep) -> StepResult:
        """Wait for a step and bring its outputs to the host."""
        sampled = jax.tree.map(np.asarray, step.sampled)
        num_items, num_logits = len(step.plan.items), step.bucket.num_logits
        if sampled.count is None:
            tokens = [[token] for token in sampled.token[:num_items].tolist()]
        else:
            rows = sampled.token.reshape(-1, num_logits)[:num_items].tolist()
            tokens = [row[:count] for row, count in zip(rows, sampled.count[:num_items].tolist(), strict=True)]
        full = None if step.logits is None else _log_softmax(step.logits)
        scores = () if step.hidden is None else tuple(self._score_prompts(step.plan, np.asarray(step.hidden)))
        pooled = tuple(part for group in step.pooled for part in group.parts())
        return StepResult(step.plan, tokens, num_logits, sampled, full, scores, pooled)

    def _update_tables(self, updates: list[tuple[int, int, int]]) -> None:
        packed = np.zeros((TABLE_UPDATES, UPDATE_WIDTH), np.int32)
        packed[:, 0] = self.program.limits.max_num_seqs
        packed[: len(updates)] = updates
        self._forward_state = self.executables.update_tables(self._forward_state, packed)

    def _start_row(self, item: ScheduledSequence) -> None:
        """A sequence takes over a row: keep its parameters, and tell the sampler's state what it needs to know."""
        sequence = item.sequence
        self._row_params[item.row] = pack_params(sequence.request, sequence.index)
        if sequence.request.pooling is not None or sequence.prompt_logprobs is not None:
            self._unusual_rows.add(item.row)
        else:
            self._unusual_rows.discard(item.row)
        if needs_state(sequence.request):
            sampler = reset_row(self._sample_state.sampler, item.row, sequence.request, sequence.output_token_ids)
            self._sample_state = SampleState(self._sample_state.rows, sampler)

    def _sampling_rows(self, plan: StepPlan, num_seqs: int) -> np.ndarray:
        """int32[S]; sequences that do not sample (a chunk, or only pooled), and padding, have the padding row."""
        padding = self.program.limits.max_num_seqs
        rows = np.full(num_seqs, padding, np.int32)
        rows[: len(plan.items)] = [
            item.row if item.samples and item.sequence.request.pooling is None else padding for item in plan.items
        ]
        return rows

    def _score_prompts(self, plan: StepPlan, hidden: np.ndarray) -> Iterator[PromptScore]:
        """Score the prompt tokens whose predecessors a step computed, for requests that ask for prompt_logprobs."""
        row = 0
        for item in plan.items:
            if item.sequence.prompt_logprobs is not None:
                yield from self._score_prompt(item, hidden[row : row + item.num_tokens])
            row += item.num_tokens

    def _score_prompt(self, item: ScheduledSequence, hidden: np.ndarray) -> Iterator[PromptScore]:
        prompt, params = item.sequence.request.prompt_token_ids, item.sequence.request.params
        last = min(item.start + item.num_tokens, len(prompt) - 1)  # the targets are positions start + 1 to last
        for first in range(item.start + 1, last + 1, PROMPT_LOGPROB_ROWS):
            count = min(PROMPT_LOGPROB_ROWS, last + 1 - first)
            offset = first - 1 - item.start
            rows = np.zeros((PROMPT_LOGPROB_ROWS, hidden.shape[1]), hidden.dtype)
            rows[:count] = hidden[offset : offset + count]
            targets = np.zeros(PROMPT_LOGPROB_ROWS, np.int32)
            targets[:count] = prompt[first : first + count]
            logits, scores = self.executables.score(self._params, rows, targets)
            full = _log_softmax(logits) if needs_full_logprobs(params.prompt_logprobs) else None
            yield PromptScore(item.sequence, first, count, jax.tree.map(np.asarray, scores), full)
