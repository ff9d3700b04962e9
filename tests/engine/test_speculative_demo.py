"""The demo model, float32: each way to guess gives the tokens that it gives without, whatever else happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.built import BuiltEngine
from engine.outputs import RequestOutput
from tests.engine.helpers import core_of, parts_of, tokens_of
from tests.engine.speculation import (
    CASES,
    HEADS,
    NUM_DRAFTS,
    Arrival,
    each_alone,
    guessing,
    random_head,
    require_same_as_alone,
)
from tests.engine.test_invariance import Schedule
from tests.models.tiny_checkpoints import write_checkpoint

PROMPTS = [
    "Repeat after me: the cat sat on the mat. The cat sat on the mat. The cat",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Once upon a time there was a fisherman who",
]
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "block_size": 16,
    "max_logprobs": -1,
    "num_gpu_blocks_override": 96,
}
METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram"},
    "suffix": {"method": "suffix"},
    "layer_skip": {"method": "layer_skip", "layers": [*range(20), *range(22, 30)]},
    "draft_model": {"method": "draft_model", "model": "demo", "quantization": "int8"},
    **{method: {"method": method} for method in HEADS},
}
LEAST_RIGHT = {"ngram": 0.2, "suffix": 0.2, "layer_skip": 0.3, "draft_model": 0.8}  # heads guess at random
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=24, ignore_eos=True),
]
# Few cases whose requests share prefixes, follow grammars, are long, or have several completions; some are aborted.
WORKLOADS: dict[str, tuple[Schedule, list[Arrival]]] = {
    "no room": (Schedule(max_num_seqs=2, spare_blocks=0), [Arrival(n) for n in (11, 4, 13, 20, 21)]),
    "small chunks": (
        Schedule(max_num_seqs=2, max_num_batched_tokens=9, spare_blocks=2, prefix_caching=False, overlap=False),
        [Arrival(n, gap) for n, gap in ((5, 0), (14, 2), (23, 1), (10, 3))],
    ),
    "aborts": (
        Schedule(max_num_seqs=2, threshold=7, policy="priority", spare_blocks=4),
        [Arrival(4), Arrival(9, 0, 12), Arrival(22, 1, 30), Arrival(13, 2), Arrival(13, 3)],
    ),
}
USED = sorted({arrival.number for _, workload in WORKLOADS.values() for arrival in workload})


@pytest.fixture(scope="module")
def plain() -> list[list[Any]]:
    """Tokens of `PROMPTS` for each of `PARAMS`, of an engine that never guesses."""
    with Engine("demo", **SETTINGS) as engine:
        return [[tokens_of(output)[0] for output in engine.generate(PROMPTS, params)] for params in PARAMS]


@pytest.fixture(scope="module", params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One that guesses wherever it can."""
    config = {**METHODS[name], "num_speculative_tokens": NUM_DRAFTS, "adaptive": False}
    if name in HEADS:
        config["model"] = str(write_head(name, tmp_path_factory.mktemp(name)))
    with Engine("demo", **SETTINGS, speculative_config=json.dumps(config)) as engine:
        yield engine


def write_head(name: str, directory: Path) -> Path:
    """Random heads of the demo model's sizes, of few tokens where the method can have few."""
    target = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "max_position_embeddings": 8192,
        "dtype": "float32",
    }
    if name != "medusa":
        return write_checkpoint(directory, *random_head(name, target))
    raw, tensors = random_head(name, target | {"vocab_size": 2000})
    tensors["token_map"] = np.sort(np.random.default_rng(1).choice(49152, 2000, replace=False))
    return write_checkpoint(directory, raw | {"truncated_vocab_size": 2000}, tensors)


@pytest.mark.slow
def test_the_tokens_are_those_without(name: str, engine: Engine, plain: list[list[Any]]) -> None:
    for params, expected in zip(PARAMS, plain, strict=True):
        assert [tokens_of(output)[0] for output in engine.generate(PROMPTS, params)] == expected
    stats = core_of(engine).stats
    assert stats.num_draft_tokens > 50
    assert stats.num_accepted_tokens >= LEAST_RIGHT.get(name, 0) * stats.num_draft_tokens


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[int, RequestOutput]:
    """What each case gives alone, without guesses."""
    return dict(zip(USED, each_alone(parts_of(engine), [CASES[number] for number in USED]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("workload", WORKLOADS)
def test_any_schedule(workload: str, engine: Engine, alone: dict[int, RequestOutput]) -> None:
    """Preemptions, chunks, prefix hits, aborts, grammars, several completions."""
    schedule, arrivals = WORKLOADS[workload]
    parts: BuiltEngine = parts_of(engine)
    core = guessing(parts, schedule, 0.8, 5)
    require_same_as_alone(core, parts, arrivals, alone)
    assert core.stats.num_draft_tokens > 0
    assert workload != "no room" or core.scheduler.stats().num_preemptions > 0
