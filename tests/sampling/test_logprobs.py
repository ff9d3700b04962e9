"""Logprobs and ranks are those of the raw distribution."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.runtime.sampling import (
    SamplerVariant,
    full_logprobs,
    prompt_logprobs,
    sample,
    unpack,
)
from tests.sampling.helpers import block_of, make_request, random_state, set_rows, situation, step


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(("vocab_size", "num_top"), [(32, 20), (8, 20), (6000, 20), (6000, 3)])
def test_prompt_logprobs(vocab_size: int, num_top: int) -> None:
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(9, vocab_size)) * 4 + 50).astype(np.float32)
    targets = rng.integers(0, vocab_size, 9).astype(np.int32)
    targets[0] = logits[0].argmax()
    expected = log_softmax(logits)
    found = prompt_logprobs(jnp.asarray(logits), jnp.asarray(targets), num_top)
    rows = np.arange(9)
    np.testing.assert_allclose(found.logprob, expected[rows, targets], atol=2e-5)
    np.testing.assert_array_equal(found.rank, 1 + (logits > logits[rows, targets][:, None]).sum(axis=1))
    assert found.rank[0] == 1
    best = np.argsort(-logits, axis=1, kind="stable")[:, :num_top]
    np.testing.assert_array_equal(found.top_ids, best)
    np.testing.assert_allclose(found.top_logprobs, np.take_along_axis(expected, best, 1), atol=2e-5)
    np.testing.assert_allclose(full_logprobs(jnp.asarray(logits)), expected, atol=2e-5)


def test_equals_share_a_rank() -> None:
    found = prompt_logprobs(jnp.array([[1.0, 2.0, 2.0, 0.0]]), jnp.array([2]))
    assert found.rank[0] == 1
    np.testing.assert_array_equal(found.top_ids[0], [1, 2, 0, 3])


def test_sampled_logprobs_are_raw() -> None:
    """Temperature, bias, penalties and filters change what is sampled, not what is reported."""
    vocab_size = 24
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, vocab_size)).astype(np.float32)
    situations = [
        situation(logprobs=5, temperature=0.0, logit_bias={7: 100.0}),
        situation(logprobs=0, temperature=0.5, top_k=2, repetition_penalty=1.7),
        situation(temperature=1.0),
    ]
    state = set_rows(random_state(vocab_size, num_rows=20), situations)
    block = block_of([make_request(s) for s in situations], [0, 1, 2], [3, 3, 3], 16, state.padding_row)
    padded = np.concatenate([logits, np.zeros((13, vocab_size), np.float32)])
    tokens, _ = step(jnp.asarray(padded), block, state, SamplerVariant.FULL)
    assert tokens.token[0] == 7
    assert tokens.logprobs is not None
    expected = log_softmax(logits)
    chosen = np.asarray(tokens.token)[:3]
    np.testing.assert_allclose(tokens.logprobs.logprob[:3], expected[np.arange(3), chosen], atol=1e-5)
    np.testing.assert_array_equal(tokens.logprobs.top_ids[:3], np.argsort(-logits, axis=1, kind="stable")[:, :20])
    assert tokens.logprobs.rank[0] == 1 + (logits[0] > logits[0, 7]).sum()


def test_only_full_returns_logprobs() -> None:
    state = random_state(16)
    block = block_of([make_request(situation())], [0], [3], 2, state.padding_row)
    logits = jnp.zeros((2, 16))
    for variant in (SamplerVariant.GREEDY, SamplerVariant.RANDOM):
        assert jax.eval_shape(partial(sample, variant=variant), logits, unpack(block), state)[0].logprobs is None
    unasked = step(logits, block, state, SamplerVariant.FULL)[0].logprobs
    assert unasked is not None and not np.asarray(unasked.top_logprobs).any()
