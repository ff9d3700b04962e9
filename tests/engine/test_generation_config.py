"""Requests without parameters get what the model's authors recommend."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.async_engine import AsyncEngine
from engine.engine import Engine
from engine.errors import ConfigError
from engine.sampling_params import SamplingParams, sampling_defaults
from tests.engine.helpers import SMALL, TINY

RECOMMENDED = {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": None, "max_new_tokens": 5, "eos_token_id": 2}
PROMPT = [5, 9, 30]


def model_that_recommends(directory: Path, recommended: Mapping[str, Any]) -> str:
    model = directory / "model"
    shutil.copytree(TINY / "llama", model)
    (model / "generation_config.json").write_text(json.dumps(recommended))
    return str(model)


def settings(cache: str) -> dict[str, Any]:
    return {**SMALL, "compilation_cache_dir": cache, "skip_tokenizer_init": True}


def test_every_way_in_follows_the_recommendation(tmp_path: Path, compilation_cache: str) -> None:
    model = model_that_recommends(tmp_path, RECOMMENDED)
    with Engine(model, **settings(compilation_cache)) as engine:
        assert engine.get_default_sampling_params() == SamplingParams(temperature=0.5, top_k=3, max_tokens=5)
        assert len(engine.generate(PROMPT)[0].outputs[0].token_ids) <= 5
        assert sum(len(output.outputs[0].token_ids) for output in engine.stream(PROMPT)) <= 5
        own = engine.generate(PROMPT, SamplingParams(max_tokens=9, ignore_eos=True))[0]
        assert len(own.outputs[0].token_ids) == 9, "a request's own parameters are not mixed with the recommendation"

    async def count(engine: AsyncEngine) -> int:
        return sum([len(output.outputs[0].token_ids) async for output in engine.generate(PROMPT)])

    async def scenario() -> int:
        async with AsyncEngine(model, **settings(compilation_cache)) as engine:
            return await count(engine)

    assert asyncio.run(scenario()) <= 5


def test_none_ignores_it(tmp_path: Path, compilation_cache: str) -> None:
    model = model_that_recommends(tmp_path, RECOMMENDED)
    with Engine(model, generation_config="none", **settings(compilation_cache)) as engine:
        assert engine.get_default_sampling_params() == SamplingParams()


def test_a_bad_recommendation_is_one_error(tmp_path: Path, compilation_cache: str) -> None:
    model = model_that_recommends(tmp_path, {"temperature": -1})
    with pytest.raises(
        ConfigError, match="generation_config.json: temperature must be in .* Set generation_config='none'"
    ):
        Engine(model, **settings(compilation_cache))
    with pytest.raises(ConfigError, match="generation_config must be one of auto, none"):
        Engine(model, generation_config="vllm", **settings(compilation_cache))


def test_fields_that_say_nothing_keep_our_defaults() -> None:
    assert sampling_defaults({"do_sample": True, "top_p": None, "pad_token_id": 0}) == SamplingParams()
