"""The same requests give the same tokens, whatever else happens in the engine.

Each request is first run alone: whole prompt in one step, nothing else in the batch, no cache, no overlap. Then random
mixes of them are run under random schedules, and every token, finish reason and log-probability must be the same.

Float noise. Other shapes sum in another order, which moves log-probabilities of these models by up to 5e-5. A sampled
token changes only if the two best candidates (logits over temperature plus Gumbel noise) are closer than that, or a
token lies so close to the border of top_k, top_p or min_p. The gap between the best two is spread over a width of about
1, so each token has a chance of about 5e-5, and the few hundred tokens of `CASES` one of some percent to hold a tie at
all. They are fixed, so it is decided once: were a tie among them, another seed would remove it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.built import BuiltEngine
from engine.core import CoreOptions, EngineCore
from engine.engine import Engine
from engine.output_processor import OutputProcessor
from engine.outputs import RequestOutput
from engine.sampling_params import RequestOutputKind, SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from tests.engine.conftest import EngineShelf
from tests.engine.helpers import (
    VOCAB,
    chosen_logprobs,
    drive,
    largest_difference,
    parts_of,
    prompt_logprobs,
    random_ids,
    require_idle,
    tokens_of,
)

MAX_LEN = 96  # of prompt and output; the executables could do more
NOISE = 1e-3  # of logprobs; observed: 5e-5

# Two sets of executables with different buckets and block sizes; everything else is the scheduler's and needs none.
STATIC = {
    "blocks of 16, steps of 64 tokens": {"max_num_batched_tokens": 64, "block_size": 16},
    "blocks of 8, steps of 24 tokens": {"max_num_batched_tokens": 24, "block_size": 8},
}


@dataclass(frozen=True)
class Case:
    """One request of the set."""

    prompt: list[int]
    params: SamplingParams


def make_cases() -> list[Case]:
    """Requests with every sampling parameter; half of the prompts begin with one of three shared passages."""
    rng = np.random.default_rng(20261121)
    passages = [random_ids(rng, length) for length in (16, 33, 48)]
    sampled = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.05, "top_k": 100, "top_p": 0.95},
        {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.4},
        {"temperature": 0.9, "logit_bias": {7: 5.0, 9: -100.0, 200: 3.0}},
        {"temperature": 1.5, "allowed_token_ids": [5, 8, 13, 21, 34, 55, 89]},
        {"temperature": 0.6, "bad_words": ["a", "the", "in"], "allowed_token_ids": list(range(60, 130))},
        {"temperature": 1.0, "stop_token_ids": list(range(3, 60)), "min_tokens": 6},
        {"temperature": 1.0, "n": 3},
        {"temperature": 0.9, "n": 2, "presence_penalty": 1.5, "logprobs": 2},
        {"temperature": 1.0, "logprobs": 5, "prompt_logprobs": 2},
        {"temperature": 1.0, "stop": ["e", "zz"], "allowed_token_ids": list(range(67, 93))},
    ]
    greedy = [
        {},
        {"logprobs": 3},
        {"prompt_logprobs": 0, "logprobs": 0},
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 1.0, "presence_penalty": -0.5},
        {"min_tokens": 12, "stop_token_ids": list(range(192, 320))},
        {"logprobs": 25},
    ]
    cases = []
    for index, fields in enumerate([*sampled, *[{"temperature": 0.0, **g} for g in greedy]]):
        passage = passages[index % 3] if index % 2 else []
        prompt = [*passage, *random_ids(rng, int(rng.integers(1, 60 - len(passage) // 2)))][:64]
        length = int(rng.integers(8, 26))
        params = SamplingParams(
            max_tokens=length, seed=1000 + index, output_kind=RequestOutputKind.FINAL_ONLY, **fields
        )
        cases.append(Case(prompt, params if "stop_token_ids" in fields else params.replace(ignore_eos=index % 3 != 0)))
    return cases


CASES = make_cases()


@dataclass(frozen=True)
class Schedule:
    """The dynamic part of a configuration: what decides who runs when, but not what is computed.

    Attributes:
        spare_blocks: blocks of the pool beyond what the longest sequence needs; few of them force preemptions.
    """

    max_num_seqs: int = 4
    max_num_batched_tokens: int = 24
    chunked: bool = True
    threshold: int = 0
    prefix_caching: bool = True
    overlap: bool = True
    spare_blocks: int = 50
    policy: str = "fcfs"


ALONE = Schedule(max_num_seqs=1, max_num_batched_tokens=64, prefix_caching=False, overlap=False)


def make_core(parts: BuiltEngine, schedule: Schedule) -> EngineCore:
    """A core with a scheduler of its own on the executables of an engine, whose KV cache holds what others left."""
    limits = SchedulerLimits(
        max_num_seqs=schedule.max_num_seqs,
        max_num_batched_tokens=min(schedule.max_num_batched_tokens, parts.limits.max_num_batched_tokens),
        max_model_len=MAX_LEN,
        block_size=parts.limits.block_size,
        enable_chunked_prefill=schedule.chunked,
        long_prefill_token_threshold=schedule.threshold,
        enable_prefix_caching=schedule.prefix_caching,
        policy=schedule.policy,
    )
    num_blocks = 1 + MAX_LEN // parts.limits.block_size + schedule.spare_blocks
    pool = BlockPool(min(num_blocks, parts.ledger.num_blocks))
    outputs, options = OutputProcessor(parts.tokenizer), CoreOptions(overlap=schedule.overlap)
    return EngineCore(Scheduler(limits, pool), parts.core.executor, outputs, options, parts.core.grammars)


def run(
    core: EngineCore,
    parts: BuiltEngine,
    chosen: Sequence[int],
    gaps: Sequence[int],
    cases: Sequence[Case] | None = None,
    lives: Sequence[int | None] = (),
) -> list[RequestOutput]:
    """Run cases by their numbers; some may occur several times.

    Args:
        core: idle.
        parts: of its engine.
        chosen: numbers.
        gaps: steps that pass before each arrives, after the one before.
        cases: None = `CASES`.
        lives: of each, steps after which it is aborted; None = never. () = nobody is.
    """
    arrivals, aborts, step = [], {}, 0
    for place, (number, gap) in enumerate(zip(chosen, gaps, strict=True)):
        step += gap
        case = (CASES if cases is None else cases)[number]
        request = parts.inputs.make(case.prompt, case.params, request_id=f"{place}")
        arrivals.append((step, replace(request, priority=number % 3)))
        life = lives[place] if lives else None
        if life is not None:
            aborts[f"{place}"] = step + life
    outputs = drive(core, arrivals, aborts)
    require_idle(core)
    return [outputs[f"{place}"] for place in range(len(chosen))]


def require_same(output: RequestOutput, expected: RequestOutput) -> None:
    """Tokens, texts and reasons are equal, logprobs up to noise."""
    assert tokens_of(output) == tokens_of(expected)
    for found, alone in zip(output.outputs, expected.outputs, strict=True):
        assert found.text == alone.text
        if alone.logprobs is not None:
            assert largest_difference(chosen_logprobs(found), chosen_logprobs(alone)) <= NOISE
            assert found.logprobs is not None
            assert [len(p) for p in found.logprobs] == [len(p) for p in alone.logprobs]
    if expected.prompt_logprobs is not None:
        assert len(prompt_logprobs(output)) == len(expected.prompt_token_ids) - 1
        assert largest_difference(prompt_logprobs(output), prompt_logprobs(expected)) <= NOISE


@pytest.fixture(scope="module")
def engines(shelf: EngineShelf) -> dict[str, Engine]:
    """One engine per set of executables."""
    return {name: shelf.take(max_logprobs=-1, **settings) for name, settings in STATIC.items()}


@pytest.fixture(scope="module")
def alone(engines: dict[str, Engine]) -> list[RequestOutput]:
    """What each case gives by itself."""
    parts = parts_of(engines["blocks of 16, steps of 64 tokens"])
    return [run(make_core(parts, ALONE), parts, [number], [0])[0] for number in range(len(CASES))]


def test_the_cases_are_worth_testing(alone: list[RequestOutput]) -> None:
    reasons = {c.finish_reason for output in alone for c in output.outputs}
    assert reasons == {"stop", "length"}
    assert {type(c.stop_reason) for output in alone for c in output.outputs} == {type(None), int, str}
    assert sum(len(c.token_ids) for output in alone for c in output.outputs) > 200
    for output in alone:
        texts = [c.token_ids for c in output.outputs]
        assert len(set(texts)) == len(texts), "n completions of one request must differ"
        assert all(0 <= t < VOCAB for ids in texts for t in ids)


schedules = st.builds(
    Schedule,
    max_num_seqs=st.integers(1, 4),
    max_num_batched_tokens=st.sampled_from([4, 7, 16, 24, 64]),
    threshold=st.sampled_from([0, 0, 3, 9]),
    prefix_caching=st.booleans(),
    overlap=st.booleans(),
    spare_blocks=st.sampled_from([0, 1, 3, 50]),
    policy=st.sampled_from(["fcfs", "priority"]),
) | st.builds(
    # Whole prompts only: they must fit in a step.
    Schedule,
    chunked=st.just(False),
    max_num_batched_tokens=st.just(64),
    max_num_seqs=st.integers(1, 4),
    overlap=st.booleans(),
    spare_blocks=st.sampled_from([0, 1, 3, 50]),
)
workloads = st.lists(
    st.tuples(st.integers(0, len(CASES) - 1), st.sampled_from([0, 0, 0, 1, 2, 7])), min_size=1, max_size=8
)


@settings(max_examples=120, derandomize=True)
@given(static=st.sampled_from(sorted(STATIC)), schedule=schedules, workload=workloads)
def test_any_schedule_gives_the_same_tokens(
    static: str,
    schedule: Schedule,
    workload: list[tuple[int, int]],
    engines: dict[str, Engine],
    alone: list[RequestOutput],
) -> None:
    parts = parts_of(engines[static])
    assume(schedule.chunked or parts.limits.max_num_batched_tokens >= schedule.max_num_batched_tokens)
    chosen, gaps = [number for number, _ in workload], [gap for _, gap in workload]
    outputs = run(make_core(parts, schedule), parts, chosen, gaps)
    for number, output in zip(chosen, outputs, strict=True):
        require_same(output, alone[number])


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("static", sorted(STATIC))
def test_forced_preemptions_change_nothing(
    static: str, prefix_caching: bool, overlap: bool, engines: dict[str, Engine], alone: list[RequestOutput]
) -> None:
    """A pool that holds the longest sequence and no more: several lose their blocks again and again."""
    parts = parts_of(engines[static])
    core = make_core(parts, Schedule(prefix_caching=prefix_caching, overlap=overlap, spare_blocks=0))
    outputs = run(core, parts, [*range(len(CASES))] * 2, [0] * len(CASES) * 2)
    for output, expected in zip(outputs, alone * 2, strict=True):
        require_same(output, expected)
    preempted = core.scheduler.stats().num_preemptions
    assert preempted >= 10
    assert sum(o.metrics.num_preemptions for o in outputs if o.metrics) == preempted


def test_cached_prefixes_change_nothing(engines: dict[str, Engine], alone: list[RequestOutput]) -> None:
    """The second time each prompt is found in the cache, as far as its request may read it."""
    parts = parts_of(engines["blocks of 8, steps of 24 tokens"])
    core = make_core(parts, Schedule(spare_blocks=1000))
    for _ in range(2):
        outputs = run(core, parts, range(len(CASES)), [0] * len(CASES))
        for output, expected in zip(outputs, alone, strict=True):
            require_same(output, expected)
    for case, output in zip(CASES, outputs, strict=True):
        whole_blocks = (len(case.prompt) - 1) // 8 * 8
        assert output.num_cached_tokens == (0 if case.params.prompt_logprobs is not None else whole_blocks)


@pytest.mark.parametrize(
    "settings_",
    [
        {"async_scheduling": False},
        {"enable_prefix_caching": False, "long_prefill_token_threshold": 5},
        {"scheduling_policy": "priority"},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 128},
    ],
    ids=lambda s: ", ".join(s),
)
def test_settings_of_the_engine_change_nothing(
    settings_: dict[str, object], shelf: EngineShelf, alone: list[RequestOutput]
) -> None:
    """The same by `Engine.generate`, with settings that a user would set."""
    engine = shelf.take(**{**STATIC["blocks of 16, steps of 64 tokens"], "max_logprobs": -1, **settings_})
    outputs = engine.generate([case.prompt for case in CASES], [case.params for case in CASES])
    for output, expected in zip(outputs, alone, strict=True):
        require_same(output, expected)
