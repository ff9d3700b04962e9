"""Counter-based random numbers: the noise of a token depends on (seed, position, token id) and on nothing else.

A row's key comes from threefry (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") over the request's
64-bit seed and the position of the token to be sampled; it is cheap, being two words per row. The bits of each token of
the vocabulary come from two rounds of a 32-bit integer hash keyed with these two words. So neither the row of the
batch, nor the batch mates, nor the shape of the executable, nor what was sampled before has any influence.

Measured on 2 AVX-512 cores, V = 49152, milliseconds for noise and argmax: `jax.random.gumbel` per row 0.93, 5.5 and 66
at S = 1, 8 and 64; the hash 0.2, 1.1 and 5, of which the hash itself is 0.5 at S = 64 and the two logarithms the rest.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

GOLDEN = 0x9E3779B1  # odd, so that distinct token ids stay distinct
BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 below 1


def row_keys(seed: jax.Array, position: jax.Array, salt: int = 0) -> jax.Array:
    """The key of each row.

    Args:
        seed: uint32[S, 2], low and high word of the request's seed.
        position: int32[S], position of the token to be sampled.
        salt: separates independent uses of the same (seed, position); 0 is the sampler's.

    Returns:
        uint32[S, 2].
    """
    keys = jax.random.wrap_key_data(seed, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, position)
    if salt:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, salt)
    return jax.random.key_data(keys)


def _mix(word: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every input bit over all bits ("lowbias32" of C. Wellons' hash-prospector)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)


def token_bits(keys: jax.Array, vocab_size: int) -> jax.Array:
    """uint32[S, V]: 32 random bits for each token.

    The first key word alone would make two rows' bits shifted copies of each other whenever their keys differ by a
    small multiple of the stride; the second word, mixed in between the rounds, prevents that.
    """
    token = jnp.arange(vocab_size, dtype=jnp.uint32)[None, :]
    return _mix(_mix(token * jnp.uint32(GOLDEN) + keys[:, :1]) ^ keys[:, 1:])


def gumbel_of(bits: jax.Array) -> jax.Array:
    """Standard Gumbel noise, always finite, of uint32 random bits; same shape, float32.

    The noise is -log(E) with E = -log(1 - u) exponential. Small E decide a draw, and u near 0 keeps all of its 32 bits
    there, where -log(u) with u near 1 would have 24. Neither logarithm meets 0: u is in [2^-33, 1 - 2^-24].
    """
    uniform = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, BELOW_ONE)))


def gumbel(keys: jax.Array, vocab_size: int) -> jax.Array:
    """Noise float32[S, V] for keys uint32[S, 2]: argmax(logits + noise) is a draw from softmax(logits)."""
    return gumbel_of(token_bits(keys, vocab_size))
