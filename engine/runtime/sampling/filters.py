"""min_p, top_k and top_p, exactly and without a sort: all three keep the tokens above a threshold of their row.

The threshold of top_k is the largest t such that at least k tokens reach it; that of top_p the largest t such that the
tokens that reach it hold p of the probability that min_p and top_k left. Both are found by bisection: first over the
tokens of the best blocks (`vocab.candidates`), which is enough for every k up to their number and for most nuclei; rows
where it is not enough go through all tokens, a few rows at a time. Tokens equal to the threshold are all kept.

                 |<- kept ->|
    logits   -4 -3 .... 7 8 9     mass(t) = sum of weights of tokens >= t; falls from left to right
                      lo^ ^hi     mass(lo) >= target > mass(hi); both end on neighbouring tokens

Measured on 2 AVX-512 cores, V = 49152, milliseconds:

    S                                          1      8     64
    jnp.sort                                 7.2     55    462
    lax.top_k, k = 1024                     0.37    3.0     24
    bisection over all tokens, one filter    0.2    1.1     25
    here, top_k = 20 and top_p = 0.8         0.2    0.5      4

A batch in which no row has top_k or top_p pays none of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from engine.runtime.sampling.vocab import candidates

BLOCK = 32
NUM_BLOCKS = 128
CHUNK = 8  # rows that go through all tokens at a time: few enough for a CPU's cache
STEPS = 8  # bisections between two looks at whether one value is left
LINEAR_ROUNDS = 2  # rounds that halve the interval of values; later ones halve that of bit patterns, which always ends


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Filters:
    """What to keep, per row.

    Attributes:
        inverse_temperature: float32[S], > 0.
        top_k: int32[S]; 0 or at least V = off.
        top_p: float32[S] in (0, 1]; 1 = off.
        min_p: float32[S] in [0, 1]; 0 = off.
    """

    inverse_temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


def _to_key(value: jax.Array) -> jax.Array:
    """float32 as int32 in the same order."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_key(key: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)


def _mass(values: jax.Array, weights: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(values >= threshold[:, None], weights, 0.0), axis=-1)


def largest_threshold(
    values: jax.Array, weights: jax.Array, target: jax.Array, active: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The largest of a row's values such that the values that reach it weigh at least `target`.

    Args:
        values: float32[S, N].
        weights: float32[S, N], >= 0; those of -inf values are not counted on.
        target: float32[S], > 0.
        active: bool[S]; other rows' results are arbitrary, and cost nothing.

    Returns:
        threshold float32[S] (the smallest finite value if the target is out of reach) and reached bool[S].
    """
    low = jnp.min(jnp.where(values > -jnp.inf, values, jnp.inf), axis=-1)
    reached = _mass(values, weights, low) >= target
    start = (_to_key(low), _to_key(jnp.max(values, axis=-1)) + 1, jnp.int32(0))

    def halve(linear: jax.Array, lo: jax.Array, hi: jax.Array) -> tuple[jax.Array, jax.Array]:
        by_value = _to_key(0.5 * _from_key(lo) + 0.5 * _from_key(hi))
        by_bits = (lo >> 1) + (hi >> 1) + (lo & hi & 1)
        middle = jnp.clip(jnp.where(linear, by_value, by_bits), lo + 1, hi - 1)
        enough = _mass(values, weights, _from_key(middle)) >= target
        return jnp.where(enough, middle, lo), jnp.where(enough, hi, middle)

    def round_of_steps(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        lo, hi, rounds = carry
        lo, hi = lax.fori_loop(0, STEPS, lambda _, ends: halve(rounds < LINEAR_ROUNDS, *ends), (lo, hi))
        # Draw both ends to values that exist: the search is over once one is left, however wide the gap around it.
        # Never outwards (-0.0 equals 0.0 but has a lower key), so that the interval shrinks whatever the values are.
        below = jnp.max(jnp.where(values < _from_key(hi)[:, None], values, -jnp.inf), axis=-1)
        return jnp.maximum(lo, _to_key(smallest_from(lo))), jnp.minimum(hi, _to_key(below) + 1), rounds + 1

    def smallest_from(lo: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(values >= _from_key(lo)[:, None], values, jnp.inf), axis=-1)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(active & (carry[0] + 1 < carry[1]))

    lo, _, _ = lax.while_loop(unfinished, round_of_steps, start)
    return smallest_from(lo), reached


def _search(
    pool: jax.Array, bound: jax.Array, values: jax.Array, floor: jax.Array, filters: Filters
) -> tuple[jax.Array, jax.Array]:
    """Thresholds of top_k, then of top_p in what top_k left, looked for in `pool` only.

    Args:
        pool: float32[S, N], values that include all those above the bound.
        bound: float32[S].
        values: float32[S, V], all values.
        floor: float32[S], the threshold of min_p.
        filters: of the S rows.

    Returns:
        threshold float32[S], at least the floor, and resolved bool[S]: False where the pool was too small.
    """
    x_max = jnp.maximum(jnp.max(values, axis=-1), jnp.finfo(jnp.float32).min)  # finite, also where all are banned
    uses_k, uses_p = _uses(filters, values.shape[1])

    def probability(x: jax.Array, threshold: jax.Array) -> jax.Array:
        exponent = (x - x_max[:, None]) * filters.inverse_temperature[:, None]
        return jnp.where(x >= threshold[:, None], jnp.exp(exponent), 0.0)

    def count(kept: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.ones_like(pool), filters.top_k.astype(jnp.float32), uses_k

    def mass(kept: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return probability(pool, kept), filters.top_p * jnp.sum(probability(values, kept), axis=-1), uses_p

    def apply(which: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept, resolved = carry
        weights, target, active = lax.cond(which == 0, count, mass, kept)
        found, reached = largest_threshold(pool, weights, target, active)
        resolved &= ~active | (reached & (found >= bound))
        return jnp.maximum(kept, jnp.where(active, found, -jnp.inf)), resolved

    # A loop over (top_k, top_p) rather than two searches: half the code to compile, and either may be left out.
    first = jnp.where(jnp.any(uses_k), 0, 1)
    last = jnp.where(jnp.any(uses_p), 2, 1)
    return lax.fori_loop(first, last, apply, (floor, jnp.ones_like(uses_p)))


def _uses(filters: Filters, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Rows that use top_k and rows that use top_p, bool[S] each."""
    return (filters.top_k > 0) & (filters.top_k < vocab_size), filters.top_p < 1.0


def _through_all_tokens(
    values: jax.Array, floor: jax.Array, filters: Filters, found: jax.Array, resolved: jax.Array
) -> jax.Array:
    """Thresholds float32[S]: `found` where resolved, else from a search over all tokens, `CHUNK` rows at a time."""
    num_rows = values.shape[0]

    def search_rows(rows: jax.Array, so_far: jax.Array) -> jax.Array:
        x, part = values[rows], jax.tree.map(lambda a: a[rows], filters)
        exact, _ = _search(x, jnp.full(rows.shape, -jnp.inf), x, floor[rows], part)
        return so_far.at[rows].set(jnp.where(resolved[rows], so_far[rows], exact))

    if num_rows <= CHUNK:  # a loop over one chunk has an invariant body, which XLA would run ahead of it, always
        return lax.cond(jnp.all(resolved), lambda: found, lambda: search_rows(jnp.arange(num_rows), found))
    order = jnp.argsort(resolved)  # unresolved rows first

    def search_chunk(index: jax.Array, so_far: jax.Array) -> jax.Array:
        return search_rows(lax.dynamic_slice(order, (index * CHUNK,), (CHUNK,)), so_far)

    num_chunks = (jnp.sum(~resolved) + CHUNK - 1) // CHUNK
    return lax.fori_loop(0, num_chunks, search_chunk, found)


def thresholds(values: jax.Array, filters: Filters, block: int = BLOCK, num_blocks: int = NUM_BLOCKS) -> jax.Array:
    """The threshold of each row: a token is kept if its logit reaches it.

    top_p counts probabilities at the row's temperature, renormalised over what min_p and top_k keep; the sums are
    float32, so a nucleus whose probability is within 1e-6 of p may go either way.

    Args:
        values: float32[S, V], processed logits before temperature; -inf = banned.
        filters: of the S rows.
        block, num_blocks: size of the pool that is searched first.

    Returns:
        float32[S], at most the row's maximum, so that a token is always kept; -inf for rows without filters.
    """
    vocab_size = values.shape[1]
    x_max = jnp.max(values, axis=-1)
    # exp((x - max) / T) >= min_p, solved for x.
    floor = jnp.where(filters.min_p > 0, x_max + jnp.log(filters.min_p) / filters.inverse_temperature, -jnp.inf)
    uses_k, uses_p = _uses(filters, vocab_size)

    def search() -> jax.Array:
        if vocab_size <= 2 * block * num_blocks:
            return _search(values, jnp.full_like(floor, -jnp.inf), values, floor, filters)[0]
        pool, bound = candidates(values, block, num_blocks)
        found, resolved = _search(pool, bound, values, floor, filters)
        return _through_all_tokens(values, floor, filters, found, resolved)

    found = lax.cond(jnp.any(uses_k | uses_p), search, lambda: floor)
    return jnp.minimum(found, x_max)
