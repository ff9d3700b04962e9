"""What one step's sampling needs to know of its rows, as one block of numbers.

The constant part of a request's parameters is packed once, when it takes over a row (`pack_params`); each step the host
picks the parts of its rows, adds where they stand (`pack_step`), and sends one int32 block [S, W]; inside the jitted
step `unpack` makes named arrays of its columns. Floats travel as their bits, the 64-bit seed as two words.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from engine.requests.request import Request
from engine.sampling_params import SamplingParams


class Column(enum.IntEnum):
    """Columns of the packed block."""

    ROW = 0
    POSITION = 1
    SEED_LOW = 2
    SEED_HIGH = 3
    TEMPERATURE = 4
    TOP_K = 5
    TOP_P = 6
    MIN_P = 7
    REPETITION = 8
    FREQUENCY = 9
    PRESENCE = 10
    MIN_POSITION = 11
    FLAGS = 12


WIDTH = len(Column)
SMALLEST_REPETITION = float(np.finfo(np.float32).tiny)  # a smaller one would be 0 in float32, and be divided by


class Flag(enum.IntFlag):
    """What a row uses beyond temperature, min_p, top_k and top_p. A row without a flag never sees that part of the
    state."""

    BIAS = 1  # logit_bias, allowed_token_ids, bad words of one token
    STOP_MASK = 2  # min_tokens
    PENALTIES = 4
    BAD_WORDS = 8  # bad words of several tokens
    LOGPROBS = 16

    @classmethod
    def state(cls) -> Flag:
        """The flags whose rows of `SamplerState` must be set before the first step."""
        return cls.BIAS | cls.STOP_MASK | cls.PENALTIES | cls.BAD_WORDS


class SamplerVariant(enum.Enum):
    """How much of the sampler an executable holds. Static: each is compiled once per bucket."""

    GREEDY = "greedy"  # every row takes the most probable token
    RANDOM = "random"  # temperature, min_p, top_k, top_p
    FULL = "full"  # everything, logprobs included


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingInputs:
    """Parameters of one step's rows.

    Attributes:
        row: int32[S], the row of `SamplerState`; the last one of the state for rows that do not sample.
        position: int32[S], position of the token to be sampled, counted from the start of the prompt.
        seed: uint32[S, 2], low and high word.
        temperature: float32[S]; 0 = greedy.
        top_k: int32[S]; 0 = off.
        top_p, min_p: float32[S]; 1 and 0 = off.
        repetition_penalty, frequency_penalty, presence_penalty: float32[S]; 1, 0 and 0 = off.
        min_position: int32[S]; tokens at earlier positions may not be stop tokens.
        flags: int32[S], of `Flag`.
    """

    row: jax.Array
    position: jax.Array
    seed: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    frequency_penalty: jax.Array
    presence_penalty: jax.Array
    min_position: jax.Array
    flags: jax.Array

    @property
    def is_greedy(self) -> jax.Array:
        """bool[S]: rows that take the most probable token."""
        return self.temperature == 0.0

    def has(self, flag: Flag) -> jax.Array:
        """bool[S]: rows with any of the flags."""
        return (self.flags & flag.value) != 0

    @property
    def masks_stops(self) -> jax.Array:
        """bool[S]: rows that have fewer than min_tokens outputs, so that stop tokens are masked."""
        return self.has(Flag.STOP_MASK) & (self.position < self.min_position)


def flags_of(params: SamplingParams, bad_word_ids: Sequence[Sequence[int]], stop_token_ids: Sequence[int]) -> Flag:
    """What a request uses.

    Args:
        params: of the request.
        bad_word_ids: token sequences that must not appear.
        stop_token_ids: all ids that end it, EOS included.
    """
    lengths = {len(word) for word in bad_word_ids}
    asked = {
        Flag.BIAS: bool(params.logit_bias) or params.allowed_token_ids is not None or 1 in lengths,
        Flag.STOP_MASK: params.min_tokens > 0 and bool(stop_token_ids),
        Flag.PENALTIES: params.has_penalties,
        Flag.BAD_WORDS: bool(lengths - {1}),
        Flag.LOGPROBS: params.logprobs is not None,
    }
    flags = Flag(0)
    for flag, wanted in asked.items():
        flags |= flag if wanted else Flag(0)
    return flags


def stop_ids_of(request: Request) -> tuple[int, ...]:
    """All ids that end the request: its own and EOS, unless it ignores EOS."""
    return tuple(dict.fromkeys((*(request.params.stop_token_ids or ()), *request.eos_token_ids)))


def needs_state(request: Request) -> bool:
    """True if the request's row of `SamplerState` must be set (`reset_row`) before it is first sampled."""
    return bool(flags_of(request.params, request.bad_word_ids, stop_ids_of(request)) & Flag.state())


def completion_seed(seed: int, index: int) -> int:
    """The seed of one of the n completions: the request's own for the first, splitmix64 of it for the others."""
    mask = (1 << 64) - 1
    if index == 0:
        return seed & mask
    word = (seed + index * 0x9E3779B97F4A7C15) & mask
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return word ^ (word >> 31)


def _float_bits(value: float) -> int:
    """Bits of the nearest finite float32."""
    largest = float(np.finfo(np.float32).max)
    return int(np.float32(min(max(value, -largest), largest)).view(np.int32))


def _words(seed: int) -> tuple[int, int]:
    low, high = np.array([seed], np.uint64).view(np.int32)
    return int(low), int(high)


def pack_params(request: Request, index: int = 0) -> np.ndarray:
    """The constant part of a row: computed once per completion and kept by the caller.

    Args:
        request: a validated request.
        index: which of its n completions.

    Returns:
        int32[W]; row and position are 0.
    """
    params = request.params
    low, high = _words(completion_seed(request.seed, index))
    packed = np.zeros(WIDTH, np.int32)
    packed[Column.SEED_LOW], packed[Column.SEED_HIGH] = low, high
    packed[Column.TEMPERATURE] = _float_bits(0.0 if params.is_greedy else params.temperature)
    packed[Column.TOP_K] = min(max(params.top_k, 0), np.iinfo(np.int32).max)
    packed[Column.TOP_P] = _float_bits(params.top_p)
    packed[Column.MIN_P] = _float_bits(params.min_p)
    packed[Column.REPETITION] = _float_bits(max(params.repetition_penalty, SMALLEST_REPETITION))
    packed[Column.FREQUENCY] = _float_bits(params.frequency_penalty)
    packed[Column.PRESENCE] = _float_bits(params.presence_penalty)
    packed[Column.MIN_POSITION] = request.num_prompt_tokens + params.min_tokens
    packed[Column.FLAGS] = flags_of(params, request.bad_word_ids, stop_ids_of(request)).value
    return packed


def padding_params() -> np.ndarray:
    """int32[W], the constant part of a row that does not sample: greedy, without filters or flags."""
    packed = np.zeros(WIDTH, np.int32)
    packed[[Column.TOP_P, Column.REPETITION]] = _float_bits(1.0)
    return packed


def pack_step(table: np.ndarray, rows: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """The block of one step.

    Args:
        table: int32[R+1, W], the `pack_params` of each row's owner; the last row holds `padding_params`.
        rows: int32[S], the row of each sequence, in the order of the logits; R for padding, and for sequences that do
            not sample in this step: their logits are those of a prompt's middle, and their state must not change.
        positions: int32[S], positions of the tokens to be sampled, i.e. how many tokens are known before them; None =
            the device, which alone knows them while a step is in flight, fills them in.

    Returns:
        int32[S, W].
    """
    block = table[rows]
    block[:, Column.ROW] = rows
    if positions is not None:
        block[:, Column.POSITION] = positions
    return block


def choose_variant(block: np.ndarray) -> SamplerVariant:
    """The least that serves all rows.

    Args:
        block: int32[n, W]: a step's block (padding rows ask for nothing), or the stacked `pack_params` of its
            sequences.
    """
    if block.size and (block[:, Column.FLAGS] != 0).any():
        return SamplerVariant.FULL
    if block.size and (block[:, Column.TEMPERATURE] != 0).any():
        return SamplerVariant.RANDOM
    return SamplerVariant.GREEDY


def with_drafts(block: jax.Array, num_drafts: jax.Array, draft_ids: jax.Array) -> jax.Array:
    """A block int32[S, W] with int32[S] numbers of drafts and int32[S, K] drafts behind it: int32[S, W + 1 + K]."""
    return jnp.concatenate([block, num_drafts[:, None], draft_ids], axis=1)


def split_drafts(block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inverse of `with_drafts`."""
    return block[:, :WIDTH], block[:, WIDTH], block[:, WIDTH + 1 :]


def unpack(block: jax.Array) -> SamplingInputs:
    """Named arrays of a block int32[S, W]; for use inside jit."""

    def floats(column: Column) -> jax.Array:
        return lax.bitcast_convert_type(block[:, column], jnp.float32)

    return SamplingInputs(
        row=block[:, Column.ROW],
        position=block[:, Column.POSITION],
        seed=lax.bitcast_convert_type(block[:, Column.SEED_LOW : Column.SEED_HIGH + 1], jnp.uint32),
        temperature=floats(Column.TEMPERATURE),
        top_k=block[:, Column.TOP_K],
        top_p=floats(Column.TOP_P),
        min_p=floats(Column.MIN_P),
        repetition_penalty=floats(Column.REPETITION),
        frequency_penalty=floats(Column.FREQUENCY),
        presence_penalty=floats(Column.PRESENCE),
        min_position=block[:, Column.MIN_POSITION],
        flags=block[:, Column.FLAGS],
    )
