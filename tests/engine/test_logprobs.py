"""Log-probabilities of outputs and prompts: which candidates, which order, which distribution."""

from __future__ import annotations

import numpy as np
import pytest

from engine.engine import Engine
from engine.outputs import RequestOutput, TokenLogprobs
from engine.sampling_params import SamplingParams
from tests.engine.conftest import MakeEngine
from tests.engine.helpers import (
    TINY,
    VOCAB,
    chosen_logprobs,
    golden_prompts,
    largest_difference,
    prompt_logprobs,
    random_ids,
)

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
NOISE = 1e-3


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    """With no limit to the number of candidates."""
    return make_engine(max_logprobs=-1)


def positions(output: RequestOutput, index: int = 0) -> list[TokenLogprobs]:
    found = output.outputs[index].logprobs
    assert found is not None and len(found) == len(output.outputs[index].token_ids)
    return found


@pytest.mark.parametrize("asked", [0, 1, 5, 20, 21, -1])
def test_candidates(asked: int, engine: Engine) -> None:
    params = SamplingParams(seed=2, max_tokens=10, ignore_eos=True, logprobs=asked, prompt_logprobs=asked)
    output = engine.generate(golden_prompts(TINY / "llama")[2].prompt, params)[0]
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    chosen = [*output.prompt_token_ids[1:], *output.outputs[0].token_ids]
    count = VOCAB if asked == -1 else asked
    decode = engine.get_tokenizer().decode
    for token, found in zip(chosen, [*output.prompt_logprobs[1:], *positions(output)], strict=True):
        assert found is not None
        ranks = {t: value.rank or 0 for t, value in found.items()}
        assert next(iter(found)) == token, "the chosen token comes first"
        # The best `count` candidates, and the chosen one if it is not among them.
        assert sorted(ranks.values()) == sorted({*range(1, count + 1), ranks[token]})
        others = [t for t in found if t != token]
        assert others == sorted(others, key=lambda t: ranks[t])
        ordered = sorted(found, key=lambda t: ranks[t])
        values = [found[t].logprob for t in ordered]
        assert values == sorted(values, reverse=True) and values[0] <= 0
        assert all(value.decoded_token == decode([t]) for t, value in found.items())
        if asked == -1:
            assert np.exp(values).sum() == pytest.approx(1.0, abs=1e-4)


def test_few_candidates_are_the_best_of_all(engine: Engine) -> None:
    few, some, every = engine.generate([[9, 10, 11]] * 3, [GREEDY.replace(logprobs=n) for n in (4, 30, -1)])
    for small, middle, whole in zip(positions(few), positions(some), positions(every), strict=True):
        assert len(small) == 4 and len(middle) == 30 and len(whole) == VOCAB
        for found in (small, middle):
            assert {t: v.rank for t, v in found.items()} == {t: whole[t].rank for t in found}
            assert largest_difference([v.logprob for v in found.values()], [whole[t].logprob for t in found]) < NOISE


def test_prompt_and_output_logprobs_agree(engine: Engine) -> None:
    """What is sampled at a position and what is found there when it is part of a prompt."""
    prompt = random_ids(np.random.default_rng(0), 45)  # computed in several chunks
    params = SamplingParams(seed=5, max_tokens=20, ignore_eos=True, logprobs=2)
    first = engine.generate(prompt, params)[0]
    whole = [*prompt, *first.outputs[0].token_ids]
    again = engine.generate(whole, GREEDY.replace(prompt_logprobs=2))[0]
    assert largest_difference(prompt_logprobs(again)[-20:], chosen_logprobs(first.outputs[0])) < NOISE
    assert again.num_cached_tokens == 0, "scores need every position to be computed"
    assert first.outputs[0].cumulative_logprob == pytest.approx(chosen_logprobs(first.outputs[0]).sum(), abs=1e-4)


def test_logprobs_are_of_the_raw_distribution(engine: Engine) -> None:
    """Neither temperature nor penalties, bias, filters or bans show in them."""
    prompt, twisted = [5, 6, 7], {"temperature": 0.3, "top_k": 3, "logit_bias": {40: 50.0}, "repetition_penalty": 1.9}
    raw = positions(engine.generate(prompt, GREEDY.replace(logprobs=-1, max_tokens=1))[0])[0]
    output = engine.generate(prompt, SamplingParams(max_tokens=1, logprobs=1, seed=0, **twisted))[0]
    assert output.outputs[0].token_ids == (40,)
    found = positions(output)[0]
    assert found[40].rank == raw[40].rank and abs(found[40].logprob - raw[40].logprob) < NOISE
    assert [t for t, value in raw.items() if value.rank == 1] == [t for t in found if t != 40]


def test_logprobs_of_several_completions(engine: Engine) -> None:
    params = SamplingParams(n=3, seed=0, max_tokens=5, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    output = engine.generate([5, 6, 7, 8], params)[0]
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 4
    for index, completion in enumerate(output.outputs):
        assert len(positions(output, index)) == 5
        total = chosen_logprobs(completion).sum()
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-4)


def test_a_prompt_of_one_token_has_no_scores(engine: Engine) -> None:
    assert engine.generate([5], GREEDY.replace(prompt_logprobs=3))[0].prompt_logprobs == [None]


def test_mixed_wishes_in_one_batch(engine: Engine) -> None:
    """Requests with and without logprobs share steps; each gets what it asked for."""
    prompts = [g.prompt for g in golden_prompts(TINY / "llama")]
    wishes = [{}, {"logprobs": 3}, {"prompt_logprobs": -1}, {"logprobs": -1, "prompt_logprobs": 0}, {}]
    for output, wish in zip(engine.generate(prompts, [GREEDY.replace(**w) for w in wishes]), wishes, strict=True):
        assert (output.outputs[0].logprobs is None) == ("logprobs" not in wish)
        assert (output.outputs[0].cumulative_logprob is None) == ("logprobs" not in wish)
        assert (output.prompt_logprobs is None) == ("prompt_logprobs" not in wish)
