"""Draws follow the exact distribution, for every knob alone, for random mixtures of them, and for mixed batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from engine.sampling_params import SamplingParams
from tests.sampling.helpers import REJECT, chi_square_p_value, draw, situation
from tests.sampling.reference import Situation, distribution

V = 16
LOGITS = np.random.default_rng(7).normal(size=V).astype(np.float32) * 1.5
PAST = {"prompt": (1, 2, 3, 3), "outputs": (5, 6, 6, 7, 6)}

KNOBS = {
    "plain": situation(),
    "cold": situation(temperature=0.3),
    "hot": situation(temperature=2.0),
    "min_p": situation(min_p=0.1),
    "min_p_one": situation(min_p=1.0),
    "top_k": situation(top_k=5),
    "top_k_one": situation(top_k=1),
    "top_k_all": situation(top_k=V),
    "top_k_minus_one": situation(top_k=-1),
    "top_p": situation(top_p=0.7),
    "top_p_tiny": situation(top_p=1e-6),
    "top_p_hot": situation(top_p=0.8, temperature=2.0),
    "all_filters": situation(temperature=1.5, min_p=0.05, top_k=8, top_p=0.9),
    "greedy": situation(temperature=0.0),
    "repetition": replace(situation(repetition_penalty=1.8), **PAST),
    "repetition_below_one": replace(situation(repetition_penalty=0.6), **PAST),
    "frequency": replace(situation(frequency_penalty=0.7), **PAST),
    "presence": replace(situation(presence_penalty=-1.3), **PAST),
    "penalties_greedy": replace(situation(temperature=0.0, frequency_penalty=2.0, repetition_penalty=1.5), **PAST),
    "logit_bias": situation(logit_bias={0: 3.0, 4: -100.0, 15: 1.0}),
    "allowed": situation(allowed_token_ids=[0, 3, 9, 15]),
    "allowed_and_bias": situation(allowed_token_ids=[0, 3, 9], logit_bias={3: 2.0, 5: 100.0}),
    "min_tokens": replace(situation(min_tokens=6, stop_token_ids=[9, 11]), stop_token_ids=(9, 11, 0), **PAST),
    "min_tokens_reached": replace(situation(min_tokens=5, stop_token_ids=[9, 11]), stop_token_ids=(9, 11, 0), **PAST),
    "bad_words": replace(
        situation(bad_words=["x"]), bad_word_ids=((8,), (6, 9), (7, 6, 10), (6, 7, 11), (5, 6, 6, 7, 6, 12)), **PAST
    ),
    "everything": replace(
        situation(
            temperature=1.3,
            min_p=0.01,
            top_k=9,
            top_p=0.95,
            repetition_penalty=1.2,
            frequency_penalty=0.3,
            presence_penalty=0.2,
            logit_bias={2: 1.0, 6: 2.0},
            min_tokens=50,
            stop_token_ids=[10],
            bad_words=["x"],
            logprobs=3,
        ),
        bad_word_ids=((14,), (6, 9)),
        stop_token_ids=(10, 11),
        **PAST,
    ),
}


def p_value(logits: np.ndarray, drawn: Situation, expected: Situation, num_draws: int, seed: int = 0) -> float:
    """Draws of one situation, judged by the distribution of another."""
    probabilities, margin = distribution(logits, expected)
    assert margin > 1e-4, "the case is too close to call for float32"
    return chi_square_p_value(draw(logits[None], [drawn], num_draws, seed)[0], probabilities)


@pytest.mark.parametrize("name", KNOBS)
def test_each_knob_alone(name: str) -> None:
    assert p_value(LOGITS, KNOBS[name], KNOBS[name], 32768) > REJECT


def test_a_uniform_distribution_keeps_all_ties() -> None:
    tied = np.zeros(V, np.float32)
    tied[:4] = 1.0
    for params in ({"top_k": 2}, {"top_p": 0.1}, {"min_p": 0.9}, {"top_k": 3, "top_p": 0.2}):
        tokens = draw(tied[None], [situation(**params)], 8192)[0]
        assert chi_square_p_value(tokens, np.array([0.25] * 4 + [0.0] * 12)) > REJECT, params


PLANTED = {
    "temperature": (situation(temperature=1.05), situation(temperature=1.0)),
    "top_k": (situation(top_k=8), situation(top_k=7)),
    "top_p": (situation(top_p=0.7), situation(top_p=0.85)),
    "min_p": (situation(min_p=0.1), situation(min_p=0.03)),
    "repetition": (KNOBS["repetition"], replace(KNOBS["repetition"], outputs=())),
    "frequency": (KNOBS["frequency"], replace(KNOBS["frequency"], outputs=(5, 6, 7))),
    "logit_bias": (situation(logit_bias={1: 0.2}), situation()),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_test_catches_a_planted_fault(name: str) -> None:
    """The same test with the same number of draws refuses a distribution that is a little off."""
    drawn, expected = PLANTED[name]
    assert p_value(LOGITS, drawn, expected, 32768) < REJECT


def test_mixed_batch() -> None:
    """All knobs at once in one batch: each row follows its own distribution."""
    for start in range(0, len(KNOBS), V):
        situations = list(KNOBS.values())[start : start + V]
        rng = np.random.default_rng(start)
        logits = rng.normal(size=(len(situations), V)).astype(np.float32)
        tokens = draw(logits, situations, 16384)
        for row, one in enumerate(situations):
            probabilities, margin = distribution(logits[row], one)
            if margin > 1e-4:
                assert chi_square_p_value(tokens[row], probabilities) > REJECT, one


tokens_of_vocabulary = st.integers(0, V - 1)


@st.composite
def situations(draw_: st.DrawFn) -> Situation:
    """Any combination of parameters, with a past."""
    optional = lambda strategy, off: st.one_of(st.just(off), strategy)  # noqa: E731 - a word for readability
    stops = draw_(st.lists(tokens_of_vocabulary, max_size=3, unique=True))
    words = draw_(st.lists(st.lists(tokens_of_vocabulary, min_size=1, max_size=4).map(tuple), max_size=4))
    params = SamplingParams(
        temperature=draw_(st.one_of(st.just(0.0), st.floats(0.2, 2.0))),
        min_p=draw_(optional(st.floats(0.001, 0.5), 0.0)),
        top_k=draw_(optional(st.integers(1, V), 0)),
        top_p=draw_(optional(st.floats(0.05, 1.0), 1.0)),
        repetition_penalty=draw_(optional(st.floats(0.5, 2.0), 1.0)),
        frequency_penalty=draw_(optional(st.floats(-2.0, 2.0), 0.0)),
        presence_penalty=draw_(optional(st.floats(-2.0, 2.0), 0.0)),
        logit_bias=draw_(optional(st.dictionaries(tokens_of_vocabulary, st.floats(-3, 3), max_size=3), None)),
        allowed_token_ids=draw_(optional(st.lists(tokens_of_vocabulary, min_size=1, unique=True), None)),
        min_tokens=draw_(st.integers(0, 8)),
        stop_token_ids=stops[:2],
        max_tokens=100,
        logprobs=draw_(st.sampled_from([None, 0, 5])),
    )
    return Situation(
        params,
        prompt=tuple(draw_(st.lists(tokens_of_vocabulary, min_size=1, max_size=6))),
        outputs=tuple(draw_(st.lists(st.integers(0, 3), max_size=8))),
        bad_word_ids=tuple(words),
        stop_token_ids=tuple(stops),
    )


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(situations(), min_size=8, max_size=8), st.integers(0, 1000))
def test_random_mixtures(batch: list[Situation], seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(len(batch), V)) * 2).astype(np.float32)
    judged = []
    for row, one in enumerate(batch):
        with np.errstate(invalid="ignore"):
            probabilities, margin = distribution(logits[row], one)
        judged.append((probabilities, margin > 1e-4 and np.isfinite(probabilities).all()))
    assume(any(ok for _, ok in judged))
    tokens = draw(logits, batch, 2048, seed)
    for row, (probabilities, ok) in enumerate(judged):
        if ok:
            assert chi_square_p_value(tokens[row], probabilities) > REJECT, (row, batch[row])
