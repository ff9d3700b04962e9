"""Real models through the whole engine, against `transformers`: tokens and log-probabilities."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from engine.engine import Engine
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from tests.engine.conftest import MakeEngine
from tests.engine.helpers import (
    GOLDEN,
    GOLDEN_SETTINGS,
    TINY,
    TINY_NAMES,
    VOCAB,
    GoldenPrompt,
    chosen_logprobs,
    core_of,
    golden_prompts,
    largest_difference,
    prompt_logprobs,
)

TOLERANCE = 1e-3  # summation order makes up to 3e-5; the mildest wrong reading of a checkpoint makes 0.06


def continue_greedily(engine: Engine, golden: tuple[GoldenPrompt, ...]) -> list[RequestOutput]:
    """All prompts in one batch; end-of-sequence tokens never stop a golden continuation."""
    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=len(g.continuation), logprobs=0, prompt_logprobs=0)
        for g in golden
    ]
    return engine.generate([g.prompt for g in golden], params)


def require_equal(outputs: list[RequestOutput], golden: tuple[GoldenPrompt, ...]) -> float:
    """Tokens are equal, logprobs within the tolerance. Returns the largest difference."""
    worst = 0.0
    for output, expected in zip(outputs, golden, strict=True):
        completion = output.outputs[0]
        assert list(completion.token_ids) == expected.continuation
        found = np.concatenate([prompt_logprobs(output), chosen_logprobs(completion)])
        worst = max(worst, largest_difference(found, expected.logprobs))
        assert completion.cumulative_logprob == pytest.approx(chosen_logprobs(completion).sum(), abs=1e-4)
    assert worst <= TOLERANCE
    return worst


@pytest.mark.parametrize("name", TINY_NAMES)
def test_greedy_continuations_equal_transformers(name: str, make_engine: MakeEngine) -> None:
    golden = golden_prompts(TINY / name)
    engine = make_engine(name, **GOLDEN_SETTINGS)
    worst = require_equal(continue_greedily(engine, golden), golden)
    print(f"{name}: largest difference of logprobs {worst:.1e}")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_whole_distribution_after_the_prompt(name: str, make_engine: MakeEngine) -> None:
    golden = golden_prompts(TINY / name)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=1, logprobs=-1)
    outputs = make_engine(name, **GOLDEN_SETTINGS).generate([g.prompt for g in golden], params)
    with np.load(TINY / name / "golden.npz") as arrays:
        for i, output in enumerate(outputs):
            logits = arrays[f"last_prompt_logits_{i}"].astype(np.float64)
            expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            assert output.outputs[0].logprobs is not None
            found = output.outputs[0].logprobs[0]
            logprobs = np.array([found[t].logprob for t in range(VOCAB)])
            assert largest_difference(logprobs, expected) <= TOLERANCE
            assert [found[t].rank for t in np.argsort(-logprobs, kind="stable")] == list(range(1, VOCAB + 1))


@pytest.mark.parametrize(
    ("name", "dtype", "mean", "largest"),
    # What rounding of weights and activations to 8 or 11 bits may do; the mildest wrong reading moves the largest
    # difference by 0.06, most by 1 or more.
    [("llama", "bfloat16", 0.1, 0.5), ("qwen3", "bfloat16", 0.1, 0.5), ("llama", "float16", 0.01, 0.1)],
)
def test_half_precision(name: str, dtype: str, mean: float, largest: float, make_engine: MakeEngine) -> None:
    golden = golden_prompts(TINY / name)
    engine = make_engine(name, **{**GOLDEN_SETTINGS, "dtype": dtype})
    assert engine.describe()["dtype"] == dtype
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=2, logprobs=3, prompt_logprobs=0)
    outputs = engine.generate([[*g.prompt, *g.continuation] for g in golden], params)
    differences = np.concatenate(
        [np.abs(prompt_logprobs(o) - g.logprobs) for o, g in zip(outputs, golden, strict=True)]
    )
    print(f"{name} {dtype}: mean difference {differences.mean():.1e}, largest {differences.max():.1e}")
    assert 0 < differences.mean() <= mean
    assert differences.max() <= largest
    assert all(np.isfinite(chosen_logprobs(o.outputs[0])).all() for o in outputs)


def smollm2() -> dict[str, Any]:
    """The golden file of SmolLM2-135M-Instruct."""
    return json.loads((GOLDEN / "smollm2" / "golden.json").read_text())


@pytest.fixture(scope="module")
def demo(compilation_cache: str) -> Engine:
    """SmolLM2-135M-Instruct in float32; the first time it is downloaded into the user's cache."""
    return Engine(
        "demo",
        dtype="float32",
        max_model_len=512,
        max_num_seqs=20,
        max_num_batched_tokens=64,
        show_progress=False,
        compilation_cache_dir=compilation_cache,
    )


@pytest.mark.slow
def test_smollm2_equals_transformers_token_for_token(demo: Engine) -> None:
    golden = golden_prompts(GOLDEN / "smollm2")
    assert [len(g.continuation) for g in golden] == [64] * 20
    compiled = demo.metrics()["compiles_after_ready"]
    worst = require_equal(continue_greedily(demo, golden), golden)
    assert demo.metrics()["compiles_after_ready"] == compiled
    print(f"SmolLM2: largest difference of logprobs {worst:.1e}")
    assert core_of(demo).stats.num_failed_steps == 0


@pytest.mark.slow
def test_smollm2_tokenizes_as_transformers(demo: Engine) -> None:
    tokenizer, golden = demo.get_tokenizer(), smollm2()
    for case in golden["tokenizer_cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    for chat in golden["chats"]:
        ids = demo.apply_chat_template(chat["messages"], add_generation_prompt=chat["add_generation_prompt"])
        assert ids == chat["ids"]


@pytest.mark.slow
def test_smollm2_from_text_and_messages(demo: Engine) -> None:
    """The same continuations when prompts are text or conversations, and their text as `transformers` decodes it."""
    prompts = smollm2()["prompts"]
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=64, skip_special_tokens=False)
    texts = [p for p in prompts if p["messages"] is None]
    chats = [p for p in prompts if p["messages"] is not None]
    assert texts and chats
    outputs = demo.generate([p["text"] for p in texts], params) + demo.chat([p["messages"] for p in chats], params)
    for expected, output in zip([*texts, *chats], outputs, strict=True):
        assert list(output.prompt_token_ids) == expected["prompt"]
        assert list(output.outputs[0].token_ids) == expected["continuation"]
        assert output.outputs[0].text == expected["continuation_text"]


@pytest.mark.slow
def test_smollm2_top_logprobs(demo: Engine) -> None:
    golden = smollm2()
    top = golden["top_logprobs"]
    prompt = next(p["prompt"] for p in golden["prompts"] if p["name"] == top["prompt_name"])
    output = demo.generate(prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=5, logprobs=5))[0]
    assert output.prompt_logprobs is not None
    for position in top["positions"]:
        after = position["position"] + 1
        if after < len(prompt):
            found = output.prompt_logprobs[after] or {}
        elif after == len(prompt):
            found = (output.outputs[0].logprobs or [])[0]
        else:
            continue
        best = sorted(found, key=lambda t: found[t].rank or 0)[:5]
        assert best == position["ids"]
        assert largest_difference([found[t].logprob for t in best], position["logprobs"]) <= TOLERANCE
