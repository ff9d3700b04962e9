"""The demo model, float32: each way to guess gives the tokens that it gives without."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine import Engine, SamplingParams
from tests.engine.helpers import core_of, tokens_of

PROMPTS = [
    "Repeat after me: the cat sat on the mat. The cat sat on the mat. The cat",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "1, 2, 3, 4, 5, 6, 7,",
    "Once upon a time there was a fisherman who",
    "List three colours: red, green,",
]
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 16
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram"},
    "suffix": {"method": "suffix"},
    "layer_skip": {"method": "layer_skip", "layers": [*range(20), *range(22, 30)]},
    "draft_model": {"method": "draft_model", "model": "demo", "quantization": "int8"},
}
LEAST_RIGHT = {"ngram": 0.2, "suffix": 0.2, "layer_skip": 0.3, "draft_model": 0.8}
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=32, ignore_eos=True),
]


@pytest.fixture(scope="module")
def plain() -> list[list[Any]]:
    with Engine("demo", **SETTINGS) as engine:
        return [[tokens_of(output)[0] for output in engine.generate(PROMPTS, params)] for params in PARAMS]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_tokens_are_those_without(name: str, plain: list[list[Any]]) -> None:
    config = {**METHODS[name], "num_speculative_tokens": 3, "adaptive": False}
    with Engine("demo", **SETTINGS, speculative_config=json.dumps(config)) as engine:
        for params, expected in zip(PARAMS, plain, strict=True):
            found = [tokens_of(output)[0] for output in engine.generate(PROMPTS, params)]
            assert found == expected
        stats = core_of(engine).stats
        assert stats.num_draft_tokens > 50
        assert stats.num_accepted_tokens > LEAST_RIGHT[name] * stats.num_draft_tokens
