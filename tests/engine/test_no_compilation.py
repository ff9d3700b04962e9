"""After the start nothing compiles, whatever is asked for: a compilation would stall every request for seconds."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from engine.core import EngineCore
from engine.engine import Engine
from engine.runtime.executor import Executor
from engine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from engine.structured.params import StructuredOutputsParams
from tests.engine.conftest import EngineShelf
from tests.engine.helpers import VOCAB, core_of, inputs_of, random_ids

# Shapes that no other engine of the run has: what another one compiled could hide a compilation here.
ODD = {"max_num_seqs": 3, "max_num_batched_tokens": 24, "block_size": 8, "max_model_len": 144, "max_logprobs": -1}
NUM_BLOCKS = 21  # 160 tokens for three sequences of up to 144: some lose their blocks

WISHES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"logprobs": 0},
    {"logprobs": 20},
    {"logprobs": -1},
    {"prompt_logprobs": 3},
    {"prompt_logprobs": -1},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": -0.3},
    {"logit_bias": {3: 2.0, 4: -100.0}},
    {"bad_words": ["a", "the cat"]},
    {"allowed_token_ids": list(range(40, 90))},
    {"min_tokens": 4, "stop_token_ids": [5, 6, 7]},
    {"top_k": 7, "top_p": 0.8, "min_p": 0.1},
    {"n": 3},
    {"n": 2, "logprobs": 2, "presence_penalty": 0.5},
    {"stop": ["a", "zz"]},
    {"detokenize": False},
    {"ignore_eos": True},
    {"skip_reading_prefix_cache": True},
    {"structured_outputs": StructuredOutputsParams(regex="[a-z]{2,6}( [0-9]+)*")},
    {"structured_outputs": StructuredOutputsParams(json_object=True)},
]


def random_params(rng: np.random.Generator) -> SamplingParams:
    """One wish, or two together."""
    fields: dict[str, Any] = {}
    for wish in rng.choice(len(WISHES), int(rng.integers(1, 3)), replace=False):
        fields |= WISHES[wish]
    if fields.get("temperature") == 0.0:
        fields.pop("n", None)
    if not fields.get("detokenize", True):
        fields.pop("stop", None)
    kinds = list(RequestOutputKind)
    kind = kinds[int(rng.integers(len(kinds)))]
    return SamplingParams(
        max_tokens=int(rng.integers(4, 20)), seed=int(rng.integers(2**31)), output_kind=kind, **fields
    )


def random_load(core: EngineCore, engine: Engine, rng: np.random.Generator, num_requests: int) -> Counter[str]:
    """Requests that arrive at random, some of which are aborted. Returns how many sequences ended how."""
    passages, ended = [random_ids(rng, 120) for _ in range(2)], Counter[str]()
    arrived, live = 0, []
    while arrived < num_requests or core.has_work:
        while arrived < num_requests and rng.random() < 0.5:
            shared = passages[int(rng.integers(2))][: int(rng.integers(120))] if rng.random() < 0.6 else []
            prompt = [*shared, *random_ids(rng, int(rng.integers(1, 24)))][:120]
            request = inputs_of(engine).make(prompt, random_params(rng))
            core.add(request)
            live.append(request.request_id)
            arrived += 1
        if rng.random() < 0.03 and live:
            core.abort(live[int(rng.integers(len(live)))])
        for output in core.step():
            if output.finished:
                live.remove(output.request_id)
                ended.update(str(c.finish_reason) for c in output.outputs)
    return ended


@pytest.fixture(scope="module")
def odd(shelf: EngineShelf) -> Engine:
    """An engine with shapes of its own."""
    return shelf.take(**ODD, num_gpu_blocks_override=NUM_BLOCKS)


def test_random_load_compiles_nothing(
    odd: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core, rng = core_of(odd), np.random.default_rng(5)
    before = odd.metrics()["compiles_after_ready"]
    overflows: list[int] = []
    update = Executor._update_tables

    def noting(executor: Executor, updates: list[tuple[int, int, int]]) -> None:
        overflows.append(len(updates))
        update(executor, updates)

    monkeypatch.setattr(Executor, "_update_tables", noting)
    with caplog.at_level(logging.WARNING, "quire.compile"):
        ended = random_load(core, odd, rng, num_requests=150)
    metrics = odd.metrics()
    assert metrics["compiles_after_ready"] == before
    assert "compiled" not in caplog.text
    assert metrics["num_failed_steps"] == 0
    # The load was what it should be: prefix hits with more blocks than a step's packed array has room for,
    # preemptions, aborts, every way to end.
    assert len(overflows) >= 10
    assert metrics["num_preemptions"] >= 10
    assert all(ended[reason] >= 3 for reason in ("stop", "length", "abort")), ended
    core.scheduler.check_invariants()


def test_the_other_ways_in_compile_nothing(odd: Engine) -> None:
    before = odd.metrics()["compiles_after_ready"]
    odd.generate(["hello", "world"], SamplingParams(max_tokens=3))
    odd.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=3))
    for _ in odd.stream("a stream", SamplingParams(max_tokens=3, temperature=0)):
        pass
    odd.beam_search("a beam", BeamSearchParams(beam_width=2, max_tokens=3))
    odd.reset_prefix_cache()
    odd.describe()
    assert odd.metrics()["compiles_after_ready"] == before


def test_a_failed_step_compiles_nothing(odd: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device state is made anew, with the same shapes."""
    before, core = odd.metrics()["compiles_after_ready"], core_of(odd)

    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(core.executor, "collect", fail)
        assert odd.generate([5, 6], SamplingParams(max_tokens=3))[0].error
    assert odd.generate([5, 6], SamplingParams(max_tokens=3, frequency_penalty=1.0))[0].error is None
    assert odd.metrics()["compiles_after_ready"] == before


def test_compilations_are_counted(odd: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """The tests above can fail: a shape that was never compiled is counted and logged."""
    before = odd.metrics()["compiles_after_ready"]
    with caplog.at_level(logging.WARNING, "quire.compile"):
        jax.jit(lambda x: x * 3 + VOCAB)(np.ones(17, np.float32)).block_until_ready()
    assert odd.metrics()["compiles_after_ready"] > before
    assert "after the engine was ready" in caplog.text
