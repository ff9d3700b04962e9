"""The dense bit stream that GPTQ, AutoRound and compressed-tensors pack small integers into.

Number i takes bits `[i * bits, (i + 1) * bits)` of a row of 32-bit words, the lowest bit first; 32 numbers take exactly
`bits` words. What AutoGPTQ does with 3 bits ("10 numbers and a split one") is this stream too.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

WORD_BITS = 32
BITS = (2, 3, 4, 5, 6, 7, 8)


def num_words(count: int, bits: int) -> int:
    """Words that hold so many numbers."""
    return -(-count * bits // WORD_BITS)


@partial(jax.jit, static_argnames=("bits", "count"))
def unpack(words: jax.Array, *, bits: int, count: int) -> jax.Array:
    """uint8[..., count] of int32[..., num_words(count, bits)]; `bits` is one of `BITS`."""
    stream = lax.bitcast_convert_type(words, jnp.uint32)
    blocks = -(-count // WORD_BITS)
    stream = jnp.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, blocks * bits - stream.shape[-1])])
    stream = stream.reshape(*stream.shape[:-1], blocks, bits)
    numbers = jnp.stack([_number(stream, index, bits) for index in range(WORD_BITS)], axis=-1)
    return numbers.reshape(*words.shape[:-1], blocks * WORD_BITS)[..., :count]


def _number(block: jax.Array, index: int, bits: int) -> jax.Array:
    """Number `index` of 32 in `bits` words, as uint8."""
    word, shift = divmod(index * bits, WORD_BITS)
    number = block[..., word] >> shift
    if shift + bits > WORD_BITS:
        number = number | (block[..., word + 1] << (WORD_BITS - shift))
    return (number & ((1 << bits) - 1)).astype(jnp.uint8)
