"""Blocked argmax, top-k and candidates equal the plain ones, ties and odd sizes included."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from engine.runtime.sampling import vocab

SIZES = [8, 128, 129, 1000, 5120, 6001]


def rows_of(vocab_size: int) -> np.ndarray:
    """Random rows, rows of ties, with bans, constant, all banned, with the maximum at the end."""
    rng = np.random.default_rng(vocab_size)
    rows = rng.normal(size=(12, vocab_size)).astype(np.float32)
    rows[4:8] = np.round(rows[4:8] * 2)
    rows[8][rng.random(vocab_size) < 0.9] = -np.inf
    rows[9] = 3.0
    rows[10] = -np.inf
    rows[11, -1] = 100.0
    return rows


@pytest.mark.parametrize("vocab_size", SIZES)
def test_argmax_takes_the_first_of_equals(vocab_size: int) -> None:
    rows = rows_of(vocab_size)
    np.testing.assert_array_equal(np.asarray(vocab.argmax(jnp.asarray(rows))), rows.argmax(axis=1))


def test_argmax_of_nan_is_a_token() -> None:
    rows = np.full((2, 1000), np.nan, np.float32)
    rows[1, 3] = 1.0
    found = np.asarray(vocab.argmax(jnp.asarray(rows)))
    assert ((found >= 0) & (found < 1000)).all()


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("k", [1, 5, 20])
def test_top_k_equals_lax(vocab_size: int, k: int) -> None:
    rows, k = jnp.asarray(rows_of(vocab_size)), min(k, vocab_size)
    for found, expected in zip(vocab.top_k(rows, k), lax.top_k(rows, k), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_candidates_hold_all_above_the_bound() -> None:
    for vocab_size in (1000, 1024):
        rows = rows_of(vocab_size)
        pool, bound = (np.asarray(a) for a in vocab.candidates(jnp.asarray(rows), 8, 20))
        assert pool.shape == (12, 160)
        for row, part, limit in zip(rows, pool, bound, strict=True):
            np.testing.assert_array_equal(np.sort(row[row > limit]), np.sort(part[part > limit]))
