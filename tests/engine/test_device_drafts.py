"""Drafts that the device makes itself never change the answer: each method, under every schedule and parameter."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.builder import BuiltEngine
from engine.core import EngineCore
from engine.errors import ConfigError, QuireError
from engine.outputs import RequestOutput
from engine.requests.sequence import Sequence
from engine.sampling_params import SamplingParams, StructuredOutputsParams
from engine.speculative.device import DeviceSpeculator
from tests.engine.conftest import EngineShelf
from tests.engine.helpers import TINY, core_of, parts_of, tokens_of
from tests.engine.test_invariance import ALONE, CASES, Schedule, make_core, require_same, run

NUM_DRAFTS = 3
EXECUTABLES: dict[str, Any] = {"max_num_batched_tokens": 24, "block_size": 8, "max_logprobs": -1}
# A model that guesses for itself is always right, one of other weights hardly ever.
METHODS: dict[str, dict[str, Any]] = {
    "layer_skip": {"method": "layer_skip", "layers": [1]},
    "packed": {"method": "layer_skip", "quantization": "int8_w8a8"},
    "same_model": {"method": "draft_model", "model": str(TINY / "llama")},
    "other_model": {"method": "draft_model", "model": str(TINY / "llama_bias")},
    "int8_weights": {"method": "draft_model", "model": str(TINY / "llama"), "quantization": "int8"},
}
SLOW = ("layer_skip", "packed", "other_model", "int8_weights")


def config_of(method: str, **changes: Any) -> str:
    return json.dumps({**METHODS[method], "num_speculative_tokens": NUM_DRAFTS, "adaptive": False, **changes})


class Fickle(DeviceSpeculator):
    """Drafts in some steps only, so that steps without follow while others are in flight, and drafters fall behind."""

    def __init__(self, parts: BuiltEngine, share: float, seed: int) -> None:
        drafter = parts.core.executor.program.drafter
        assert drafter is not None
        super().__init__(NUM_DRAFTS, None, 4, drafter.lags, drafter.forget)
        self.share, self.rng = share, np.random.default_rng(seed)

    def pays(self, sequences: list[Sequence]) -> bool:
        return self.rng.random() < self.share and super().pays(sequences)


def speculating(parts: BuiltEngine, schedule: Schedule, share: float, seed: int) -> EngineCore:
    core = make_core(parts, schedule)
    core._speculator = Fickle(parts, share, seed)
    return core


EACH = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in METHODS]


@pytest.fixture(scope="module", params=EACH)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def parts(shelf: EngineShelf, method: str) -> BuiltEngine:
    return parts_of(shelf.take(**EXECUTABLES, speculative_config=config_of(method)))


@pytest.fixture(scope="module")
def alone(shelf: EngineShelf) -> list[RequestOutput]:
    """What each case gives by itself in an engine that does not speculate."""
    plain = parts_of(shelf.take(**EXECUTABLES))
    return [run(make_core(plain, ALONE), plain, [number], [0])[0] for number in range(len(CASES))]


def test_every_parameter(parts: BuiltEngine, alone: list[RequestOutput], method: str) -> None:
    core = speculating(parts, Schedule(spare_blocks=200), 1.0, 0)
    for output, expected in zip(run(core, parts, range(len(CASES)), [0] * len(CASES)), alone, strict=True):
        require_same(output, expected)
    stats = core.stats
    assert stats.num_draft_tokens > 100
    if method == "same_model":
        # Penalties, bans and grammars are not drafted with, so not all are right.
        assert stats.num_accepted_tokens > 0.6 * stats.num_draft_tokens


def test_a_model_foresees_itself(shelf: EngineShelf, alone: list[RequestOutput]) -> None:
    """Without penalties and bans all its guesses are right, greedy and at random: nothing of its cache is lost."""
    parts = parts_of(shelf.take(**EXECUTABLES, speculative_config=config_of("same_model")))
    plain = [0, 1, 2, 3, 9, 11, 13, 14]
    core = speculating(parts, Schedule(spare_blocks=200), 0.7, 1)
    for output, number in zip(run(core, parts, plain, [0, 2] * 4), plain, strict=True):
        require_same(output, alone[number])
    assert core.stats.num_accepted_tokens > 0.97 * core.stats.num_draft_tokens > 30


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    schedule=st.builds(
        Schedule,
        max_num_seqs=st.integers(1, 4),
        threshold=st.sampled_from([0, 3]),
        prefix_caching=st.booleans(),
        overlap=st.booleans(),
        spare_blocks=st.sampled_from([0, 1, 3, 50]),
        policy=st.sampled_from(["fcfs", "priority"]),
    ),
    workload=st.lists(st.tuples(st.integers(0, len(CASES) - 1), st.sampled_from([0, 0, 1, 5])), min_size=1, max_size=6),
    share=st.sampled_from([0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_schedule(
    schedule: Schedule,
    workload: list[tuple[int, int]],
    share: float,
    seed: int,
    parts: BuiltEngine,
    alone: list[RequestOutput],
) -> None:
    core = speculating(parts, schedule, share, seed)
    chosen, gaps = [number for number, _ in workload], [gap for _, gap in workload]
    for number, output in zip(chosen, run(core, parts, chosen, gaps), strict=True):
        require_same(output, alone[number])


def test_preempted_again_and_again(parts: BuiltEngine, alone: list[RequestOutput]) -> None:
    core = speculating(parts, Schedule(spare_blocks=0), 0.7, 3)
    for output, expected in zip(run(core, parts, range(len(CASES)), [0] * len(CASES)), alone, strict=True):
        require_same(output, expected)
    assert core.scheduler.stats().num_preemptions > 0


def test_grammars(method: str, shelf: EngineShelf) -> None:
    """The host reads the drafts and masks the row after each."""
    grammar = StructuredOutputsParams(regex="(ab|cd){2,6}")
    params = [
        SamplingParams(temperature=t, max_tokens=20, seed=seed, structured_outputs=grammar if seed % 2 else None)
        for seed, t in enumerate([0.0, 0.0, 1.0, 1.0])
    ]
    prompts = ["abab", "cdcdcd {", "ab cd ab cd", '{"a": 1}']
    plain = shelf.take(**EXECUTABLES).generate(prompts, params)
    engine = shelf.take(**EXECUTABLES, speculative_config=config_of(method))
    before = core_of(engine).stats.num_draft_tokens
    for output, expected in zip(engine.generate(prompts, params), plain, strict=True):
        assert tokens_of(output) == tokens_of(expected)
    assert core_of(engine).stats.num_draft_tokens > before


def test_state_made_anew_forgets_what_was_drafted(parts: BuiltEngine, alone: list[RequestOutput]) -> None:
    """As after a failed step; the drafter's too, and later requests get their tokens."""
    core = speculating(parts, Schedule(spare_blocks=200), 1.0, 0)
    core.executor.reset_state()
    for output, expected in zip(run(core, parts, [1, 14], [0, 0]), (alone[1], alone[14]), strict=True):
        require_same(output, expected)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"method": "layer_skip"}, "layers or quantization is missing"),
        ({"method": "layer_skip", "quantization": "int5"}, "speculative_config: quantization 'int5' is not known"),
        ({"method": "layer_skip", "layers": 0}, "number of layers or a list"),
        ({"method": "layer_skip", "layers": [1, 0]}, "ascending indices"),
        ({"method": "layer_skip", "layers": 99}, "leave out at least one of the model's 3 layers"),
        ({"method": "layer_skip", "layers": [0, 1, 2]}, "leave out at least one"),
        ({"method": "layer_skip", "layers": [7]}, "name none beyond 2"),
        ({"method": "draft_model"}, "model is missing"),
        ({"method": "draft_model", "model": "no/such-model-here-at-all"}, "no/such-model-here-at-all"),
        ({"method": "draft_model", "model": str(TINY / "llama"), "quantization": "int3"}, "quantization must be"),
        ({"method": "ngram", "layers": 1}, "layers is of method 'layer_skip' only"),
        ({"method": "layer_skip", "layers": 1, "num_speculative_tokens": 30}, "do not fit in max_num_batched_tokens"),
    ],
)
def test_bad_settings(config: dict[str, Any], says: str, shelf: EngineShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(QuireError) as caught:
        shelf.take(**EXECUTABLES, speculative_config=json.dumps({"num_speculative_tokens": 2, **config}))
    assert says in str(caught.value)


def test_a_draft_model_of_another_vocabulary(shelf: EngineShelf, tmp_path: Any) -> None:
    """Both sizes are named."""
    config = json.loads((TINY / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 64}))
    settings = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 2}
    with pytest.raises(ConfigError, match=f"has 64 tokens and the model {config['vocab_size']}"):
        shelf.take(**EXECUTABLES, load_format="dummy", speculative_config=json.dumps(settings))


def test_packed_weights_are_not_packed_again(shelf: EngineShelf) -> None:
    settings = {**METHODS["packed"], "num_speculative_tokens": 2}
    with pytest.raises(ConfigError, match="this model's are packed already"):
        shelf.take(**EXECUTABLES, quantization="int8", speculative_config=json.dumps(settings))
