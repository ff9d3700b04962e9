"""Thresholds of min_p, top_k and top_p keep exactly the right tokens, whichever way they were found."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.runtime.sampling.filters import Filters, largest_threshold, thresholds
from tests.sampling.reference import filtered, softmax

V = 200
POOLS = {"all tokens": (32, 128), "pool of 8 blocks": (4, 8), "pool of 2 blocks": (4, 2)}


@partial(jax.jit, static_argnums=(2, 3))
def find(values: jax.Array, filters: Filters, block: int, num_blocks: int) -> jax.Array:
    return thresholds(values, filters, block, num_blocks)


def filters_of(rows: list[tuple[float, int, float, float]]) -> Filters:
    """From rows of (temperature, top_k, top_p, min_p)."""
    temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*rows, strict=True))
    return Filters(
        jnp.asarray(1 / temperature, jnp.float32),
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(min_p, jnp.float32),
    )


def logits_of(kind: str, num_rows: int, rng: np.random.Generator) -> np.ndarray:
    logits = (rng.normal(size=(num_rows, V)) * rng.uniform(0.1, 6, size=(num_rows, 1))).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits * 2) / 2
    if kind == "bfloat16":
        logits = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float32)
    if kind == "banned":
        logits[rng.random(logits.shape) < 0.8] = -np.inf
        logits[:, 0] = 0.0
    return logits


@pytest.mark.parametrize("num_rows", [5, 20])
@pytest.mark.parametrize("kind", ["random", "ties", "bfloat16", "banned"])
@pytest.mark.parametrize("pool", POOLS)
def test_kept_tokens_equal_the_reference(pool: str, kind: str, num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    num_judged = 0
    for _ in range(6):
        logits = logits_of(kind, num_rows, rng)
        rows = [
            (
                rng.uniform(0.2, 2.0),
                int(rng.choice([0, 1, 3, 30, V - 1, V, 10**6])),
                float(rng.choice([1.0, 0.01, 0.5, 0.9, 0.999])),
                float(rng.choice([0.0, 0.0, 0.05, 0.7, 1.0])),
            )
            for _ in range(num_rows)
        ]
        found = np.asarray(find(jnp.asarray(logits), filters_of(rows), *POOLS[pool]))
        assert (found <= logits.max(axis=1)).all()
        for x, threshold, (temperature, top_k, top_p, min_p) in zip(logits, found, rows, strict=True):
            expected, margin = filtered(softmax(x.astype(np.float64) / temperature), min_p, top_k, top_p)
            if margin > 1e-4:
                num_judged += 1
                # Where no filter bites, banned tokens are "kept" too: their logit stays -inf.
                np.testing.assert_array_equal((x >= threshold) & (x > -np.inf), expected > 0)
    assert num_judged > 2 * num_rows


@pytest.mark.parametrize("pool", POOLS)
def test_top_k_keeps_exactly_k_distinct_tokens(pool: str) -> None:
    """Also where neighbours differ by one unit in the last place, and across zero, denormals and huge numbers."""
    rng = np.random.default_rng(0)
    close = np.float32(7.0) + np.arange(V, dtype=np.float32) * np.spacing(np.float32(7.0))
    wide = np.sort(np.concatenate([np.geomspace(1e-37, 1e37, V // 2), -np.geomspace(1e-37, 1e37, V // 2)]))
    logits = np.stack([rng.permutation(row) for row in (close, wide.astype(np.float32)) for _ in range(10)])
    for k in (1, 2, 17, 99, 100, 101, V - 1):
        found = np.asarray(find(jnp.asarray(logits), filters_of([(1.0, k, 1.0, 0.0)] * 20), *POOLS[pool]))
        assert ((logits >= found[:, None]).sum(axis=1) == k).all()


@pytest.mark.parametrize("pool", POOLS)
def test_rows_without_filters_have_no_threshold(pool: str) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(20, V)), jnp.float32)
    rows = [(0.7, 5, 0.9, 0.1) if i % 2 else (1.3, 0, 1.0, 0.0) for i in range(20)]
    found = np.asarray(find(logits, filters_of(rows), *POOLS[pool]))
    assert (found[::2] == -np.inf).all()
    assert (found[1::2] > -np.inf).all()


@pytest.mark.parametrize("pool", POOLS)
def test_a_row_does_not_depend_on_its_mates(pool: str) -> None:
    rng = np.random.default_rng(3)
    logits = logits_of("random", 20, rng)
    rows = [(1.0, int(rng.integers(0, 60)), float(rng.uniform(0.3, 1)), 0.0) for _ in range(20)]
    together = np.asarray(find(jnp.asarray(logits), filters_of(rows), *POOLS[pool]))
    for i in (0, 7, 19):
        alone = np.asarray(find(jnp.asarray(logits[i : i + 1]), filters_of(rows[i : i + 1]), *POOLS[pool]))
        assert alone[0] == together[i]


@pytest.mark.parametrize("pool", POOLS)
def test_odd_rows_end_and_keep_a_token(pool: str) -> None:
    """All equal, all banned, one left, zeros of both signs, NaN: the search ends, and the maximum stays."""
    logits = np.zeros((8, V), np.float32)
    logits[1] = -np.inf
    logits[2] = -np.inf
    logits[2, 7] = 3.0
    logits[3, ::2] = -0.0
    logits[4, 0] = 1e-45
    logits[5] = np.nan
    logits[6, :3] = 3e38
    logits[7] = -3e38
    logits = np.concatenate([logits, logits, logits[:4]])
    for row in ((1.0, 3, 1.0, 0.0), (0.01, 0, 0.5, 0.0), (2.0, 50, 0.9, 0.3), (1.0, 0, 1e-30, 1.0)):
        found = np.asarray(find(jnp.asarray(logits), filters_of([row] * 20), *POOLS[pool]))
        for i in (0, 2, 3, 4, 6, 7):
            assert (logits[i] >= found[i]).any(), (i, row)
        assert found[1] == -np.inf


def test_large_vocabulary_against_a_sort() -> None:
    """The sizes of a real step: narrow rows are decided in the pool, wide ones go through all tokens."""
    rng = np.random.default_rng(1)
    vocab_size = 49152
    logits = (rng.normal(size=(12, vocab_size)) * np.linspace(0.2, 4, 12)[:, None]).astype(np.float32)
    rows = [(1.0, 50 if i % 3 == 0 else 0, 0.9, 0.0) for i in range(12)]
    rows[1] = (1.0, 3000, 1.0, 0.0)
    found = np.asarray(find(jnp.asarray(logits), filters_of(rows), 32, 128))
    sizes = []
    for x, threshold, (_, top_k, top_p, _) in zip(logits, found, rows, strict=True):
        descending = np.sort(x.astype(np.float64))[::-1][: top_k or None]
        mass = np.cumsum(softmax(descending))
        size = int(np.searchsorted(mass, top_p)) + 1 if top_p < 1 else len(descending)
        kept = int((x >= threshold).sum())
        assert kept == pytest.approx(size, abs=0 if top_p == 1 else max(1, 1e-4 * size))
        sizes.append(kept)
    assert min(sizes) < 100 < 4096 < max(sizes)


def test_unreachable_target_keeps_all_finite_values() -> None:
    values = jnp.array([[1.0, 2.0, -jnp.inf, 0.5]])
    threshold, reached = largest_threshold(values, jnp.ones_like(values), jnp.array([9.0]), jnp.array([True]))
    assert threshold[0] == 0.5
    assert not reached[0]
