"""Verified drafts give what plain sampling gives: the same tokens of each seed, and so the exact distribution.

For every way to draft, every method by its name, and every sampling parameter. A new method is one line in `METHODS`, a
new parameter one in `CASES`. Verification that is a little wrong is refused by the same test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.input_processor import InputProcessor, ModelLimits
from engine.runtime.sampling import SampledTokens, SamplerState
from engine.runtime.sampling.inputs import completion_seed
from engine.runtime.sampling.verify import num_right, verify
from engine.sampling_params import SamplingParams
from engine.speculative import settings
from tests.sampling.helpers import REJECT, chi_square_p_value, situation
from tests.speculative.chains import (
    NUM_CHAINS,
    TARGET,
    Case,
    Drafter,
    V,
    adversarial,
    certain,
    coupled,
    independent,
    jitted,
    plain,
    sentence_ids,
    speculated,
)
from tests.speculative.methods import METHODS

VERIFY_MODULE = sys.modules[verify.__module__]  # the package has a function of its name

WAYS: dict[str, Drafter] = {
    "certain": certain,
    "coupled": coupled,
    "independent": independent,
    "adversarial": adversarial,
}
DRAFTERS = WAYS | METHODS

PAST = {"prompt": (0, 1, 1, 2), "outputs": (3, 2, 3)}


def case(grammar: bool = False, past: dict[str, Any] | None = None, **params: object) -> Case:
    return Case(replace(situation(**params), **{"prompt": (1,), **(past or {})}), grammar)


CASES = {
    "greedy": case(temperature=0.0),
    "temperature": case(),
    "cold": case(temperature=0.4),
    "hot": case(temperature=1.8),
    "top_k": case(top_k=3),
    "top_p": case(top_p=0.75),
    "min_p": case(min_p=0.15),
    "repetition": case(repetition_penalty=1.7, past=PAST),
    "frequency": case(frequency_penalty=1.2, past=PAST),
    "presence": case(presence_penalty=-1.1, past=PAST),
    "penalties_greedy": case(temperature=0.0, frequency_penalty=1.5, repetition_penalty=1.3, past=PAST),
    "logit_bias": case(logit_bias={0: 1.5, 3: -2.0}),
    "bad_words": replace(
        case(bad_words=["x"], past=PAST),
        situation=replace(
            case(bad_words=["x"], past=PAST).situation, bad_word_ids=((4,), (2, 1), (3, 0), (3, 1, 2), (0, 0))
        ),
    ),
    "allowed_token_ids": case(allowed_token_ids=[0, 2, 3]),
    "grammar": case(grammar=True),
    "grammar_and_penalties": case(grammar=True, frequency_penalty=0.8, top_k=2, past=PAST),
    "min_tokens": replace(
        case(past=PAST),
        situation=replace(case(min_tokens=5, stop_token_ids=[2], past=PAST).situation, stop_token_ids=(2, 4)),
    ),
    "logprobs": case(logprobs=2, top_p=0.9),
    "everything": case(
        grammar=True,
        temperature=1.3,
        top_k=4,
        top_p=0.97,
        min_p=0.01,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=0.4,
        logit_bias={1: 0.7},
        logprobs=1,
        past=PAST,
    ),
}


def words(seeds: list[int]) -> np.ndarray:
    """Seeds of 64 bits as uint32[S, 2], low word first."""
    return np.array([seed & ((1 << 64) - 1) for seed in seeds], np.uint64).view(np.uint32).reshape(-1, 2)


@cache
def seeds_by(way: str) -> np.ndarray:
    """Seeds of many requests that bring their own, of such that bring none, and of the completions of one request."""
    if way == "own":
        return np.random.default_rng(17).integers(0, 1 << 32, (NUM_CHAINS, 2), dtype=np.uint32)
    if way == "completions":
        return words([completion_seed(1234, index) for index in range(NUM_CHAINS)])
    inputs = InputProcessor(ModelLimits(V, 64, 20, ()), None, seed=0)
    return words([inputs.make([1], SamplingParams(max_tokens=1)).seed for _ in range(NUM_CHAINS)])


@cache
def plain_tokens(name: str, way: str) -> np.ndarray:
    return plain(CASES[name], seeds_by(way))


@cache
def exact(name: str) -> np.ndarray:
    return CASES[name].exact()


def p_value(tokens: np.ndarray, name: str) -> float:
    return chi_square_p_value(sentence_ids(tokens), exact(name))


SELDOM_RIGHT = ("adversarial", "ngram", "suffix")  # nothing repeats itself in a few tokens
FAST = ("temperature", "everything")


def test_every_method_is_held_to_it() -> None:
    """One that is added later is missed here."""
    assert set(METHODS) == set(settings.METHODS)


@pytest.mark.parametrize(
    ("drafter", "name"),
    [
        pytest.param(drafter, name, marks=[] if drafter in WAYS or name in FAST else pytest.mark.slow)
        for drafter in DRAFTERS
        for name in CASES
    ],
)
def test_drafts_change_nothing(drafter: str, name: str) -> None:
    """Token by token what plain sampling gives, and together the exact distribution over all sentences."""
    tokens, rate = speculated(CASES[name], DRAFTERS[drafter], seeds_by("own"))
    assert (tokens == plain_tokens(name, "own")).all()
    assert p_value(tokens, name) > REJECT
    assert rate > 0.05 or drafter in SELDOM_RIGHT, "hardly a draft was ever right: nothing was tested"


@pytest.mark.parametrize("way", ["unseeded", "completions"])
@pytest.mark.parametrize("name", ["temperature", "everything"])
def test_seeds_from_elsewhere(name: str, way: str) -> None:
    """Seeds that the engine draws, and those of the n completions of one request."""
    tokens, _ = speculated(CASES[name], coupled, seeds_by(way))
    assert (tokens == plain_tokens(name, way)).all()
    assert p_value(tokens, name) > REJECT


def test_the_same_noise_agrees_more_often() -> None:
    """What coupling is for; and it keeps its bound (1 - d) / (1 + d), d the distance of the distributions."""
    rates = {name: speculated(CASES["temperature"], DRAFTERS[name], seeds_by("own"))[1] for name in WAYS}
    assert rates["coupled"] > rates["independent"] + 0.1


# Verification that is wrong in ways that are easy to get wrong.


def accept_likely(*arguments: Any) -> tuple[SampledTokens, SamplerState]:
    """Keeps a draft that is more probable than not, whatever was drawn."""
    return _accept_above(0.5, *arguments)


def accept_possible(*arguments: Any) -> tuple[SampledTokens, SamplerState]:
    """Keeps a draft unless it is improbable: "typical acceptance"."""
    return _accept_above(0.05, *arguments)


def _accept_above(least: float, *arguments: Any) -> tuple[SampledTokens, SamplerState]:
    logits, _, num_drafts, draft_ids = arguments[:4]
    sampled, state = verify(*arguments)
    rows = draft_ids.shape[1] + 1
    shares = jax.nn.softmax(logits, axis=-1).reshape(-1, rows, logits.shape[-1])
    share = jnp.take_along_axis(shares[:, :-1], draft_ids[:, :, None], axis=2)[:, :, 0]
    tokens = sampled.token.reshape(-1, rows)
    tokens = tokens.at[:, :-1].set(jnp.where(share > least, draft_ids, tokens[:, :-1]))
    count = num_right(tokens, num_drafts, draft_ids) + 1
    return replace(sampled, token=tokens.reshape(-1), count=count), state


def reject_what_was_drawn(*arguments: Any) -> tuple[SampledTokens, SamplerState]:
    """Never gives a draft in the place after which it stops: as if it had been refused."""
    logits, inputs, num_drafts, draft_ids, state, variant, num_top = arguments
    rows = draft_ids.shape[1] + 1
    banned = jnp.pad(jax.nn.one_hot(draft_ids[:, :1], logits.shape[-1]), ((0, 0), (0, rows - 1), (0, 0)))
    logits = jnp.where(banned.reshape(logits.shape) > 0, logits - 0.5, logits)
    return verify(logits, inputs, num_drafts, draft_ids, state, variant, num_top)


def same_noise_everywhere(*arguments: Any) -> tuple[SampledTokens, SamplerState]:
    """Forgets that each place has a position of its own."""
    with pytest.MonkeyPatch.context() as patch:
        kept = ("position",)
        patch.setattr(VERIFY_MODULE, "replace", lambda x, **new: replace(x, **_without(new, kept)))
        return verify(*arguments)


def penalties_of_the_first_place(*arguments: Any) -> tuple[SampledTokens, SamplerState]:
    """Takes what the sequence was before the step for what it is at each place of it."""
    sample, state = VERIFY_MODULE.sample, arguments[4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            VERIFY_MODULE,
            "sample",
            lambda logits, inputs, later, *rest: (
                sample(logits, inputs, state, *rest)[0],
                sample(logits, inputs, later, *rest)[1],
            ),
        )
        return verify(*arguments)


def count_one_too_many(*arguments: Any) -> tuple[SampledTokens, SamplerState]:
    """Keeps the token that was drawn after a wrong draft."""
    sampled, state = verify(*arguments)
    assert sampled.count is not None
    return replace(sampled, count=jnp.minimum(sampled.count + 1, arguments[2] + 1)), state


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "accept_likely": (accept_likely, "temperature"),
    "accept_possible": (accept_possible, "temperature"),
    "reject_what_was_drawn": (reject_what_was_drawn, "temperature"),
    "same_noise_everywhere": (same_noise_everywhere, "temperature"),
    "same_noise_with_penalties": (same_noise_everywhere, "frequency"),
    "penalties_of_the_first_place": (penalties_of_the_first_place, "frequency"),
    "bad_words_of_the_first_place": (penalties_of_the_first_place, "bad_words"),
    "count_one_too_many": (count_one_too_many, "temperature"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["accept_possible", "count_one_too_many"])
@pytest.mark.parametrize("drafter", METHODS)
def test_a_planted_bias_is_caught_with_each_method(drafter: str, fault: str) -> None:
    """Where a method's guesses come from does not hide it."""
    verifier, name = FAULTS[fault]
    tokens, _ = speculated(CASES[name], DRAFTERS[drafter], seeds_by("own"), jitted(verifier))
    assert p_value(tokens, name) < REJECT
    assert (tokens != plain_tokens(name, "own")).any()


COMPILE_LONG = ("accept_possible", "same_noise_with_penalties", "bad_words_of_the_first_place", "reject_what_was_drawn")


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[pytest.mark.slow] if name in COMPILE_LONG else []) for name in FAULTS]
)
def test_a_planted_bias_is_caught(fault: str) -> None:
    """By the distribution alone, and by equality."""
    verifier, name = FAULTS[fault]
    tokens, _ = speculated(CASES[name], certain, seeds_by("own"), jitted(verifier))
    assert p_value(tokens, name) < REJECT
    assert (tokens != plain_tokens(name, "own")).any()


def test_the_language_is_no_trivial_one() -> None:
    """Its tokens depend on each other, and no case has only one sentence but the greedy ones."""
    assert np.unique(TARGET.argmax(-1)).size > 1
    for name in CASES:
        assert (np.count_nonzero(exact(name)) == 1) == ("greedy" in name)
