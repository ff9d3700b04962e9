"""A toy device and engine around the scheduler, to prove that no plan ever reads or writes the wrong block.

The toy's "keys and values" of a token are one number, a hash of the whole prefix up to it, computed from the number
*read out of the page* of the token before. The next token is a hash of the last of them. So a block that is shared
wrongly, evicted too early, written by two sequences or forgotten on the device changes what is read, and `ToyDevice`
compares all that it reads with `Truth`, which needs no cache.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from engine.errors import ContextLengthError
from engine.requests.request import Request
from engine.requests.sequence import FinishReason, Sequence
from engine.sampling_params import SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.plan import FROM_DRAFT, ScheduledSequence, StepPlan
from engine.scheduling.scheduler import Scheduler

VOCAB = 23
EOS = 2


def make_limits(**changes: Any) -> SchedulerLimits:
    """Limits that are small enough to be met often."""
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, "block_size": 4}
    return SchedulerLimits(**{**settings, **changes})


def make_sequences(
    request_id: str,
    prompt: list[int] | tuple[int, ...],
    *,
    eos: tuple[int, ...] = (),
    seed: int = 0,
    priority: int = 0,
    cache_salt: str | None = None,
    **params: Any,
) -> list[Sequence]:
    """The n sequences of a request; `params` are fields of `SamplingParams`."""
    request = Request(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**params),
        eos_token_ids=eos,
        bad_word_ids=(),
        seed=seed,
        priority=priority,
        cache_salt=cache_salt,
        arrival_time=0.0,
    )
    return [Sequence(request, index) for index in range(request.params.n)]


@dataclass
class Truth:
    """What a sequence computes if it is alone in the world and no stop applies; extended as far as somebody asks.

    Attributes:
        sequence: whose.
        root: stands for what must not be shared with others: the salt, and the request if prefix caching is off.
        tokens: prompt and outputs.
        kvs: one per token; `kvs[i]` depends on `tokens[: i + 1]`.
    """

    sequence: Sequence
    root: int
    tokens: list[int] = field(default_factory=list)
    kvs: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, sequence: Sequence, private: bool) -> Truth:
        request = sequence.request
        root = hash((crc32(repr(request.cache_salt).encode()), crc32(request.request_id.encode()) if private else 0))
        truth = cls(sequence, root, list(request.prompt_token_ids))
        truth.extend(len(truth.tokens))
        return truth

    def extend(self, num_tokens: int) -> None:
        """Compute until `num_tokens` have keys and values, sampling as far as needed."""
        while len(self.kvs) < num_tokens:
            if len(self.kvs) == len(self.tokens):
                self.tokens.append(self.sample(self.kvs[-1]))
            self.kvs.append(next_kv(self.kvs[-1] if self.kvs else self.root, self.tokens[len(self.kvs)]))

    def sample(self, kv: int) -> int:
        """The token after one whose keys and values are `kv`."""
        return hash((kv, self.sequence.request.seed, self.sequence.index)) % VOCAB

    def outputs(self, count: int) -> list[int]:
        """The first outputs."""
        start = self.sequence.num_prompt_tokens
        self.extend(start + count)
        return self.tokens[start : start + count]

    def ending(self, max_len: int, stop_at: int | None) -> tuple[list[int], FinishReason, int | str | None]:
        """All outputs, finish reason, stop reason, by the rules; `stop_at` = the output that meets a stop string."""
        request = self.sequence.request
        params, room = request.params, max_len - request.num_prompt_tokens
        for count in range(1, min(request.max_tokens, room) + 1):
            outputs = self.outputs(count)
            if count >= params.min_tokens and outputs[-1] in request.eos_token_ids:
                return outputs, FinishReason.STOP, None
            if count >= params.min_tokens and outputs[-1] in (params.stop_token_ids or ()):
                return outputs, FinishReason.STOP, outputs[-1]
            if count == stop_at:
                return outputs, FinishReason.STOP, "text"
        return outputs, FinishReason.LENGTH, None


def next_kv(kv: int, token: int) -> int:
    """Keys and values of a token after one with `kv`."""
    return hash((kv, token))


def guess(truth: Truth, start: int, num_right: int, count: int) -> list[int]:
    """`count` guesses of the tokens from position `start` on, of which the first `num_right` are right."""
    truth.extend(start + count)
    tokens = truth.tokens[start : start + count]
    return [token if place < num_right else (token + 1) % VOCAB for place, token in enumerate(tokens)]


class ToyDevice:
    """Pages, and per row a block table and the last sampled token; it knows only what plans told it.

    Where a plan holds `FROM_DRAFT` the device guesses itself, right or wrong, from what its row knows.
    """

    def __init__(self, num_blocks: int, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.num_blocks = num_blocks
        self.rng = random.Random(num_blocks)  # of its guesses
        self.wipe()

    def wipe(self) -> None:
        """Lose everything, as after a failed step."""
        self.pages: list[list[int | None]] = [[None] * self.limits.block_size for _ in range(self.num_blocks)]
        self.tables: list[list[int]] = [[] for _ in range(self.limits.max_num_seqs)]
        self.last_tokens: list[int | None] = [None] * self.limits.max_num_seqs
        self.num_known: list[int | None] = [None] * self.limits.max_num_seqs

    def run(self, plan: StepPlan, truths: dict[Sequence, Truth]) -> list[list[int]]:
        """Write all of the step, then read, as each layer does. Returns per item the drafts that were right and the
        token sampled after them.

        Raises:
            AssertionError: the plan makes a sequence read or write what it must not.
        """
        assert 0 < plan.num_tokens <= self.limits.max_num_batched_tokens, "the budget is exceeded"
        assert len({item.row for item in plan.items}) == len(plan.items), "two items in one row"
        written: set[tuple[int, int]] = set()
        drafts: list[list[int]] = []
        for item in plan.items:
            self._update_row(item)
            drafts.append(self._drafts(item, truths[item.sequence]))
            self._write(item, drafts[-1], truths[item.sequence], written)
        return [self._attend(item, d, truths[item.sequence]) for item, d in zip(plan.items, drafts, strict=True)]

    def _update_row(self, item: ScheduledSequence) -> None:
        table = self.tables[item.row]
        if item.starts_row:
            table.clear()
            self.last_tokens[item.row] = self.num_known[item.row] = None
        assert len(table) == item.first_new_block, "the device's block table is not what the plan continues"
        table += item.sequence.block_table[item.first_new_block :]
        assert table == item.sequence.block_table, "the device's block table differs from the host's"
        assert 0 not in table, "the null block is in a block table"

    def _drafts(self, item: ScheduledSequence, truth: Truth) -> list[int]:
        """Those of the plan, or those that the device makes in their places."""
        count = len(item.drafts)
        stop = self._start(item) + item.num_tokens
        assert stop <= self.limits.max_model_len, "a token is computed that no sequence may have"
        if FROM_DRAFT not in item.drafts:
            return list(item.drafts)
        assert set(item.drafts) == {FROM_DRAFT}, "drafts of the host and of the device are mixed"
        return guess(truth, stop - count, self.rng.randrange(count + 1), count)

    def _write(self, item: ScheduledSequence, drafts: list[int], truth: Truth, written: set[tuple[int, int]]) -> None:
        table, size = self.tables[item.row], self.limits.block_size
        tokens = item.sequence.token_ids(item.start, item.start + item.num_tokens - len(drafts))
        for position, token in enumerate([*tokens, *drafts], self._start(item)):
            value = self.last_tokens[item.row] if token == -1 else token
            assert value is not None, "a pending token is not in the row"
            kv = self.pages[table[(position - 1) // size]][(position - 1) % size] if position else truth.root
            assert kv is not None, "a page is read that was never written"
            slot = (table[position // size], position % size)
            assert slot not in written, "a slot is written twice in one step"
            written.add(slot)
            self.pages[slot[0]][slot[1]] = next_kv(kv, value)

    def _start(self, item: ScheduledSequence) -> int:
        """Position of the item's first token."""
        if not item.is_relative:
            return item.start
        num_known = self.num_known[item.row]
        assert num_known is not None, "the plan relies on a length that the row does not have"
        return num_known - 1

    def _attend(self, item: ScheduledSequence, drafts: list[int], truth: Truth) -> list[int]:
        known = self._start(item) + item.num_tokens - len(drafts)
        sampled: list[int] = []
        while True:
            stop = known + len(sampled)
            context = [kv for block in self.tables[item.row] for kv in self.pages[block]][:stop]
            truth.extend(stop)
            assert context == truth.kvs[:stop], "the pages do not hold the sequence's own prefix"
            if not item.samples:
                return []
            token = truth.sample(truth.kvs[stop - 1])
            sampled.append(token)
            if len(sampled) > len(drafts) or drafts[len(sampled) - 1] != token:
                break
        self.last_tokens[item.row], self.num_known[item.row] = token, known + len(sampled)
        return sampled


class ToyEngine:
    """plan → run → commit, `depth` plans ahead, with all checks after each call.

    Attributes:
        stop_at: outputs after which a sequence meets a "stop string".
        tokens: what `commit` delivered, per sequence.
    """

    def __init__(self, limits: SchedulerLimits, num_blocks: int, depth: int, check: bool = True) -> None:
        self.limits, self.depth, self.check = limits, depth, check
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(limits, self.pool)
        self.device = ToyDevice(num_blocks, limits)
        self.in_flight: deque[tuple[StepPlan, list[list[int]]]] = deque()
        self.truths: dict[Sequence, Truth] = {}
        self.stop_at: dict[Sequence, int] = {}
        self.tokens: dict[Sequence, list[int]] = {}

    def add(self, sequences: list[Sequence], stop_at: int | None = None) -> None:
        """Submit one request; its errors pass through."""
        self.scheduler.add(sequences)
        for sequence in sequences:
            self.truths[sequence] = Truth.of(sequence, private=not self.limits.enable_prefix_caching)
            self.tokens[sequence] = []
            if stop_at is not None:
                self.stop_at[sequence] = stop_at

    def plan(self) -> StepPlan | None:
        """Plan and run one step."""
        plan = self.scheduler.plan()
        if plan is not None:
            self.in_flight.append((plan, self.device.run(plan, self.truths)))
        elif not self.in_flight:
            assert not self.scheduler.has_work, "stuck: there is work, nothing is in flight, and nothing is planned"
        self.check_invariants()
        return plan

    def commit(self) -> None:
        """Read the oldest step."""
        plan, sampled = self.in_flight.popleft()
        stopped: set[Sequence] = set()
        for sequence, token, index, _, num_outputs, ends in self.scheduler.commit(plan, sampled):
            assert plan.items[index].sequence is sequence
            if sequence in stopped:
                continue
            assert sequence.output_token_ids[num_outputs - 1] == token
            assert sequence.finished or not ends
            self.tokens[sequence].append(token)
            if self.stop_at.get(sequence) == num_outputs:
                self.scheduler.finish(sequence, FinishReason.STOP, "text", num_outputs)
                stopped.add(sequence)
        self.check_invariants()

    def draft(self, sequence: Sequence, num_right: int, num_wrong: int) -> None:
        """Guess what follows the tokens that the host knows of a sequence."""
        known = sequence.num_prompt_tokens + len(sequence.output_token_ids)
        sequence.draft_token_ids = tuple(guess(self.truths[sequence], known, num_right, num_right + num_wrong))

    def draft_at_random(self, rng: random.Random, by: str) -> None:
        """Give drafts to some of the running sequences, by the "host", which reads what is in flight first, or by the
        "device".
        """
        while by == "host" and self.in_flight:
            self.commit()
        for sequence in self.scheduler.running:
            count = rng.choice([0, 1, 2, 5])
            if by == "device":
                sequence.draft_token_ids = (FROM_DRAFT,) * count
            else:
                num_right = rng.randrange(count + 1)
                self.draft(sequence, num_right, count - num_right)

    def step(self) -> None:
        """One turn of the loop: keep `depth` plans in flight, if there are so many."""
        plan = self.plan()
        if self.in_flight and (plan is None or len(self.in_flight) > self.depth):
            self.commit()

    def fail_oldest(self) -> None:
        """The oldest step raised: the device loses everything."""
        plan, _ = self.in_flight[0]
        self.scheduler.fail(plan)
        self.in_flight.clear()
        self.device.wipe()
        self.check_invariants()

    def drain(self) -> None:
        """Run until nothing is left; then nothing may be held."""
        while self.scheduler.has_work or self.in_flight:
            self.step()
        self.scheduler.check_invariants()
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_queued_reqs, stats.num_in_flight) == (0, 0, 0, 0)
        assert self.pool.num_free == self.pool.num_usable, "blocks leaked"

    def check_invariants(self) -> None:
        """All invariants of the scheduler, unless the test looks only at the device."""
        if self.check:
            self.scheduler.check_invariants()

    def check_results(self) -> None:
        """Every finished sequence has exactly the tokens, and the end, that it would have had alone."""
        for sequence, truth in self.truths.items():
            got = sequence.output_token_ids
            assert got == self.tokens[sequence], "delivered tokens differ from the record"
            runs = sequence.accepted_runs
            assert sequence.num_accepted == sum(right * steps for right, steps in enumerate(runs))
            assert got == truth.outputs(len(got)), "wrong tokens"
            if sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                outputs, reason, stop_reason = truth.ending(self.scheduler.max_len, self.stop_at.get(sequence))
                assert (got, sequence.finish_reason, sequence.stop_reason) == (outputs, reason, stop_reason)


def random_sequences(rng: random.Random, request_id: str, max_prompt: int) -> tuple[list[Sequence], int | None]:
    """A random request that often shares a prefix with another, and the output at which a stop string comes, if any."""
    document = random.Random(rng.randrange(3)).choices(range(VOCAB), k=max_prompt)
    shared = rng.randrange(max_prompt)
    prompt = [*document[:shared], *rng.choices(range(VOCAB), k=rng.randrange(1, 4))][:max_prompt]
    max_tokens = rng.choice([1, 2, 5, 12, 24])
    sequences = make_sequences(
        request_id,
        prompt,
        eos=rng.choice([(), (EOS,)]),
        seed=rng.randrange(4),
        priority=rng.randrange(3),
        cache_salt=rng.choice([None, None, None, "a", "b"]),
        n=rng.choice([1, 1, 1, 2, 3]),
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, min(3, max_tokens)]),
        stop_token_ids=rng.choice([(), (5, 7)]),
        prompt_logprobs=rng.choice([None] * 7 + [1]),
        skip_reading_prefix_cache=rng.random() < 0.1,
    )
    return sequences, rng.choice([None, None, None, 4])


def run_random(engine: ToyEngine, num_requests: int, seed: int, drafts_by: str | None = None) -> None:
    """Random arrivals, aborts, failures and resets around a running engine, to the end; checks all results.

    Args:
        drafts_by: "host" or "device", of drafts in most steps; None = there are none.
    """
    rng = random.Random(seed)
    max_prompt = min(40, engine.limits.max_model_len - 1)
    added = 0
    while added < num_requests:
        for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
            sequences, stop_at = random_sequences(rng, f"r{added}", max_prompt)
            try:
                engine.add(sequences, stop_at)
            except ContextLengthError:
                assert sequences[0].num_prompt_tokens > min(
                    engine.pool.num_usable * engine.limits.block_size, engine.limits.max_num_batched_tokens
                )
            added += 1
        if rng.random() < 0.05 and added:
            engine.scheduler.abort(f"r{rng.randrange(added)}")
        if rng.random() < 0.01:
            engine.scheduler.reset_prefix_cache()
        if rng.random() < 0.005 and engine.in_flight:
            engine.fail_oldest()
        while True:
            if drafts_by is not None and rng.random() < 0.8:
                engine.draft_at_random(rng, drafts_by)
            engine.step()
            if engine.scheduler.num_waiting < 3 * engine.limits.max_num_seqs:
                break
    engine.drain()
    engine.check_results()
