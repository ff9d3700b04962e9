"""Any interleaving of arrivals, steps, aborts, stops, failures and resets: a state machine around the toy engine."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import ContextLengthError, QueueFullError
from engine.requests.sequence import FinishReason, Sequence
from engine.scheduling.plan import FROM_DRAFT
from tests.scheduling.toy import EOS, ToyEngine, make_limits, make_sequences

BLOCK_SIZE = 4


class SchedulerMachine(RuleBasedStateMachine):
    """Each rule is one call that an engine or a user can make at any time."""

    @initialize(
        depth=st.integers(0, 2),
        num_blocks=st.integers(3, 11),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(4, 14),
        caching=st.booleans(),
        chunked=st.booleans(),
        threshold=st.sampled_from([0, 3]),
        policy=st.sampled_from(["fcfs", "priority"]),
        max_queued=st.sampled_from([None, None, 3]),
    )
    def start(self, depth, num_blocks, max_num_seqs, budget, caching, chunked, threshold, policy, max_queued):
        limits = make_limits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=24,
            block_size=BLOCK_SIZE,
            long_prefill_token_threshold=threshold if chunked else 0,
            enable_chunked_prefill=chunked,
            enable_prefix_caching=caching,
            policy=policy,
            max_num_queued_reqs=max_queued,
        )
        self.engine = ToyEngine(limits, num_blocks, depth)
        self.num_added = 0

    @rule(
        # Two prompts and their prefixes; a changed last token makes them differ where a block would end.
        document=st.sampled_from([[4] * 18, list(range(18))]),
        length=st.integers(1, 18),
        last=st.sampled_from([4, 9]),
        n=st.sampled_from([1, 1, 2, 3]),
        max_tokens=st.sampled_from([1, 4, 9, 14, 20]),
        salt=st.sampled_from([None, None, "a"]),
        priority=st.integers(0, 2),
        seed=st.integers(0, 1),
        stops=st.sampled_from([{}, {}, {"eos": (EOS,)}, {"stop_token_ids": (EOS, 5), "eos": (6,)}]),
        reads_cache=st.sampled_from([{}, {}, {"prompt_logprobs": 0}, {"skip_reading_prefix_cache": True}]),
    )
    def add(self, document, length, last, n, max_tokens, salt, priority, seed, stops, reads_cache):
        sequences = make_sequences(
            f"r{self.num_added}",
            [*document[: length - 1], last],
            n=n,
            max_tokens=max_tokens,
            min_tokens=max_tokens // 3,
            cache_salt=salt,
            priority=priority,
            seed=seed,
            **stops,
            **reads_cache,
        )
        self.num_added += 1
        limits = self.engine.limits
        try:
            self.engine.add(sequences)
        except QueueFullError:
            assert self.engine.scheduler.stats().num_queued_reqs == limits.max_num_queued_reqs
        except ContextLengthError:
            fits_pool = length <= self.engine.pool.num_usable * BLOCK_SIZE
            assert not fits_pool or (not limits.enable_chunked_prefill and length > limits.max_num_batched_tokens)

    @precondition(lambda self: self.running())
    @rule(choice=st.integers(0, 100), num_right=st.integers(0, 6), num_wrong=st.integers(0, 2))
    def draft(self, choice, num_right, num_wrong):
        """Right drafts only where the host knows all tokens; others are wrong, which must not matter."""
        running = self.running()
        self.engine.draft(running[choice % len(running)], num_right, num_wrong)

    @precondition(lambda self: self.running())
    @rule(counts=st.lists(st.integers(0, 5), min_size=4, max_size=4))
    def draft_on_the_device(self, counts):
        """Nobody on the host knows the ids, nor, with steps in flight, how many tokens there are."""
        for sequence, count in zip(self.running(), counts, strict=False):
            sequence.draft_token_ids = (FROM_DRAFT,) * count

    @precondition(lambda self: len(self.engine.in_flight) <= self.engine.depth)
    @rule()
    def plan(self):
        self.engine.plan()

    @precondition(lambda self: self.engine.in_flight)
    @rule()
    def commit(self):
        self.engine.commit()

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            self.engine.step()

    @precondition(lambda self: self.unfinished())
    @rule(
        kind=st.sampled_from(["abort", "abort", "stop", "stop", "stop", "fail", "reset"]),
        choice=st.integers(0, 100),
        calm=st.integers(0, 3),
    )
    def disturb(self, kind, choice, calm):
        """One rule for all that ends sequences: as rules of their own they would leave few alive."""
        engine, scheduler = self.engine, self.engine.scheduler
        sequence = self.unfinished()[choice % len(self.unfinished())]
        if calm:
            engine.step()
        elif kind == "abort":
            scheduler.abort(sequence.request.request_id)
        elif kind == "stop" and sequence.output_token_ids:
            # A stop string is found late, or the user has seen enough.
            engine.stop_at[sequence] = len(sequence.output_token_ids)
            scheduler.finish(sequence, FinishReason.STOP, "text")
        elif kind == "fail" and engine.in_flight:
            engine.fail_oldest()
        elif kind == "reset":
            scheduler.reset_prefix_cache()

    @invariant()
    def nothing_is_wrong(self):
        self.engine.scheduler.check_invariants()

    def running(self) -> list[Sequence]:
        return list(self.engine.scheduler.running)

    def unfinished(self) -> list[Sequence]:
        return [sequence for sequence in self.engine.truths if not sequence.finished]

    def teardown(self):
        if "engine" in vars(self):
            self.engine.drain()
            self.engine.check_results()


# The same examples in every run, and so many that they take seconds: a failure is a defect, never luck or a slow
# machine.
BOUNDED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=120,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
)
TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = BOUNDED


class LongSchedulerMachine(SchedulerMachine):
    """The same, more of it."""


TestLongSchedulerMachine = pytest.mark.slow(LongSchedulerMachine.TestCase)
TestLongSchedulerMachine.settings = settings(BOUNDED, max_examples=500, stateful_step_count=60)
