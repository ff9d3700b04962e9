"""The dense bit stream that GPTQ, AutoRound and compressed-tensors pack small integers into.

Number i takes bits `[i * bits, (i + 1) * bits)` of a row of 32-bit words, the lowest bit first; 32 numbers take exactly
`bits` words. What AutoGPTQ does with 3 bits ("10 numbers and a split one") is this stream too.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
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
    if WORD_BITS % bits == 0:  # no number is split between two words
        numbers = stream[..., None] >> jnp.arange(0, WORD_BITS, bits, dtype=jnp.uint32)
    else:
        blocks = -(-count // WORD_BITS)
        stream = jnp.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, blocks * bits - stream.shape[-1])])
        numbers = _shifted(stream.reshape(*stream.shape[:-1], blocks, bits), bits)
    numbers = (numbers & ((1 << bits) - 1)).astype(jnp.uint8)
    return numbers.reshape(*words.shape[:-1], -1)[..., :count]


def _shifted(blocks: jax.Array, bits: int) -> jax.Array:
    """uint32[..., 32], each number in the lowest bits, of 32 numbers in `bits` words [..., bits]."""
    words, shifts = np.divmod(np.arange(WORD_BITS) * bits, WORD_BITS)
    rest = blocks[..., np.minimum(words + 1, bits - 1)] << ((WORD_BITS - shifts) % WORD_BITS).astype(np.uint32)
    return (blocks[..., words] >> shifts.astype(np.uint32)) | jnp.where(shifts == 0, 0, rest)
