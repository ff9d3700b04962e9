"""The counter-based noise is uniform and shows no correlation along any of its counters: token, position, seed."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2, kstest

from engine.runtime.sampling.noise import BELOW_ONE, gumbel_of, row_keys, token_bits
from tests.sampling.helpers import REJECT, chi_square_p_value, draw, situation

ROWS, COLUMNS = 1024, 512


@jax.jit
def bits_of(seed: jax.Array, position: jax.Array) -> jax.Array:
    return token_bits(row_keys(seed, position), COLUMNS)


def by_token() -> np.ndarray:
    """Rows are unrelated seeds, columns are consecutive tokens."""
    seeds = np.random.default_rng(0).integers(0, 1 << 32, (ROWS, 2), dtype=np.uint32)
    return np.asarray(bits_of(seeds, jnp.zeros(ROWS, jnp.int32)))


def by_position() -> np.ndarray:
    """Rows are tokens of one seed, columns are consecutive positions."""
    return np.asarray(bits_of(jnp.zeros((ROWS, 2), jnp.uint32), jnp.arange(ROWS, dtype=jnp.int32))).T


def by_seed() -> np.ndarray:
    """Rows are tokens of one position, columns are seeds 0, 1, 2, ..."""
    seeds = np.stack([np.arange(ROWS), np.zeros(ROWS)], axis=1).astype(np.uint32)
    return np.asarray(bits_of(seeds, jnp.full(ROWS, 100, jnp.int32))).T


def by_high_seed() -> np.ndarray:
    """Rows are tokens of one position, columns are seeds 0, 2^32, 2^33, ..."""
    seeds = np.stack([np.zeros(ROWS), np.arange(ROWS)], axis=1).astype(np.uint32)
    return np.asarray(bits_of(seeds, jnp.full(ROWS, 100, jnp.int32))).T


COUNTERS = [by_token, by_position, by_seed, by_high_seed]


def uniform_p_value(cells: np.ndarray, num_cells: int) -> float:
    """Chi-square of cell numbers against the uniform distribution."""
    counts = np.bincount(cells.ravel(), minlength=num_cells)
    expected = cells.size / num_cells
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), num_cells - 1))


def independence_faults(bits: np.ndarray) -> list[str]:
    """What is wrong with uint32[rows, columns], if not independent and uniform along the columns."""
    faults = []
    for name, shift in (("high byte", 24), ("middle byte", 12), ("low byte", 0)):
        if uniform_p_value((bits >> np.uint32(shift)).astype(np.int64) & 255, 256) < REJECT:
            faults.append(f"{name} not uniform")
    uniform = bits / 2.0**32 - 0.5
    for lag in (1, 2, 3, 16, 64):
        left, right = uniform[:, :-lag], uniform[:, lag:]
        correlation = (left * right).mean() * 12
        if abs(correlation) > 5 / np.sqrt(left.size):
            faults.append(f"correlation {correlation:.1e} at lag {lag}")
        pairs = (bits[:, :-lag] >> np.uint32(28)).astype(np.int64) * 16 + (bits[:, lag:] >> np.uint32(28))
        if uniform_p_value(pairs, 256) < REJECT:
            faults.append(f"pairs at lag {lag} not uniform")
        flips = np.unpackbits(np.ascontiguousarray(bits[:, :-lag] ^ bits[:, lag:]).view(np.uint8)).mean()
        if abs(flips - 0.5) > 5 * 0.5 / np.sqrt(left.size * 32):
            faults.append(f"{flips:.4f} of the bits differ at lag {lag}")
    return faults


@pytest.mark.parametrize("counter", COUNTERS)
def test_bits_are_uniform_and_independent(counter: Callable[[], np.ndarray]) -> None:
    assert independence_faults(counter()) == []


def test_the_test_catches_bad_generators() -> None:
    """A linear congruential step, a repeated row, and a slight bias are all noticed."""
    rng = np.random.default_rng(0)
    good = rng.integers(0, 1 << 32, (ROWS, COLUMNS), dtype=np.uint32)
    assert independence_faults(good) == []
    keys = rng.integers(0, 1 << 32, (ROWS, 1), dtype=np.uint32)
    assert independence_faults(keys + np.arange(COLUMNS, dtype=np.uint32) * np.uint32(0x9E3779B1))
    assert independence_faults(np.where(rng.random(good.shape) < 0.02, np.roll(good, 1, axis=1), good))
    assert independence_faults(np.where(rng.random(good.shape) < 0.02, good | np.uint32(1 << 31), good))


def test_rows_are_not_shifted_copies() -> None:
    """Keys whose first words differ by a multiple of the tokens' stride still give unrelated rows."""
    keys = jnp.array([[5, 1], [(5 + 3 * 0x9E3779B1) % 2**32, 2]], jnp.uint32)
    first, second = np.asarray(token_bits(keys, COLUMNS))
    assert not (first[3:] == second[:-3]).any()
    assert abs(np.corrcoef(first[3:], second[:-3])[0, 1]) < 5 / np.sqrt(COLUMNS)


def test_each_bit_is_fair() -> None:
    bits = by_token()
    for i in range(32):
        mean = ((bits >> np.uint32(i)) & np.uint32(1)).mean()
        assert abs(mean - 0.5) < 5 * 0.5 / np.sqrt(bits.size), i


def test_keys_are_distinct() -> None:
    seeds = np.array([(low, high) for low in range(40) for high in range(5)], np.uint32).repeat(100, axis=0)
    positions = np.tile(np.arange(100, dtype=np.int32), 200)
    for salt in (0, 1):
        keys = np.asarray(row_keys(jnp.asarray(seeds), jnp.asarray(positions), salt))
        assert len({tuple(k) for k in keys}) == len(keys)
    assert (
        not (np.asarray(row_keys(seeds, positions, 0)) == np.asarray(row_keys(seeds, positions, 1))).all(axis=1).any()
    )


def test_noise_is_standard_gumbel() -> None:
    assert kstest(np.asarray(gumbel_of(jnp.asarray(by_token()))).ravel()[:200_000], "gumbel_r").pvalue > REJECT


def test_noise_is_finite_at_the_ends() -> None:
    ends = np.asarray(gumbel_of(jnp.array([0, 1, 2**32 - 257, 2**32 - 1], jnp.uint32)))
    assert np.isfinite(ends).all()
    assert ends[0] == pytest.approx(33 * np.log(2), rel=1e-6)  # u = 2^-33: -log(u) to first order
    assert ends[-1] == pytest.approx(-np.log(-np.log(1 - BELOW_ONE)), rel=1e-6)
    assert (np.diff(ends) <= 0).all()


def test_a_large_uniform_vocabulary() -> None:
    """No bias towards any part of the vocabulary, nor towards low ids through ties of the noise."""
    vocab_size = 49152
    tokens = draw(np.zeros((1, vocab_size), np.float32), [situation()], 1024, chunk=64)[0]
    assert chi_square_p_value(tokens // 768, np.full(64, 1 / 64)) > REJECT
    assert chi_square_p_value(tokens % 32, np.full(32, 1 / 32)) > REJECT
    assert len(np.unique(tokens)) == pytest.approx(1024 * (1 - 1024 / 2 / vocab_size), rel=0.02)
