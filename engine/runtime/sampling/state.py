"""What the sampler remembers of each running request on the device: token counts, biases, stop tokens, bad words.

One row per running request, plus a last one that padding reads and writes. Only requests that need it (`needs_state`)
have their row set, by `reset_row`, when they are admitted and again when they come back after preemption; what a
finished request left in a row is never read, because every use asks the row's flags first. The step itself counts the
tokens that it samples (`advance`): the host, one step behind, takes no part in that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from engine.requests.constraints import MAX_BAD_WORD_SEQUENCES, MAX_BAD_WORD_TOKENS
from engine.requests.request import Request
from engine.runtime.sampling.inputs import Flag, SamplingInputs, flags_of, stop_ids_of
from engine.sampling_params import MAX_ALLOWED_TOKEN_IDS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS

IN_PROMPT = 1 << 30  # bit of token_info; the bits below it count outputs
NO_TOKEN = -1
NUM_RECENT = MAX_BAD_WORD_TOKENS - 1
HISTORY_CHUNK = 1024


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """Rows of all running requests; donated to each step that changes it. R rows and one for padding.

    Attributes:
        token_info: int32[R+1, V], how often each token was sampled, and `IN_PROMPT` if the prompt holds it.
        bias: float32[R+1, V], added to the logits; -inf = never sampled.
        stop_ids: int32[R+1, stop ids], masked while outputs are fewer than min_tokens; padded with -1.
        bad_words: int32[R+1, 256, 16], bad words of several tokens, aligned to the right; padded with -1.
        recent: int32[R+1, 15], the last outputs, newest last; padded with -1.
    """

    token_info: jax.Array
    bias: jax.Array
    stop_ids: jax.Array
    bad_words: jax.Array
    recent: jax.Array

    @property
    def padding_row(self) -> int:
        """The row of sequences that do not sample."""
        return self.bias.shape[0] - 1


def _shapes(num_rows: int, vocab_size: int, num_eos_ids: int) -> dict[str, tuple[tuple[int, ...], str]]:
    rows = num_rows + 1
    return {
        "token_info": ((rows, vocab_size), "int32"),
        "bias": ((rows, vocab_size), "float32"),
        "stop_ids": ((rows, MAX_STOP_TOKEN_IDS + num_eos_ids), "int32"),
        "bad_words": ((rows, MAX_BAD_WORD_SEQUENCES, MAX_BAD_WORD_TOKENS), "int32"),
        "recent": ((rows, NUM_RECENT), "int32"),
    }


def state_size_bytes(num_rows: int, vocab_size: int, num_eos_ids: int) -> int:
    """Bytes of device memory that `make_state` takes, for the memory ledger."""
    shapes = _shapes(num_rows, vocab_size, num_eos_ids).values()
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes)


def make_state(num_rows: int, vocab_size: int, num_eos_ids: int) -> SamplerState:
    """A state of `num_rows` rows and one for padding.

    Args:
        num_rows: most running requests.
        vocab_size: V of the logits.
        num_eos_ids: most EOS ids that a request may have.
    """
    return SamplerState(**{name: jnp.zeros(*spec) for name, spec in _shapes(num_rows, vocab_size, num_eos_ids).items()})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _RowContents:
    """One request's row in fixed shapes; ids are padded with -1.

    Attributes:
        row: int32[].
        allowed: int32[1024]; all padding = every token is allowed.
        bias_ids, bias_values: int32[1024], float32[1024].
        banned: int32[256], bad words of one token.
        stop_ids, bad_words, recent: as in `SamplerState`, without the row axis.
    """

    row: np.int32
    allowed: np.ndarray
    bias_ids: np.ndarray
    bias_values: np.ndarray
    banned: np.ndarray
    stop_ids: np.ndarray
    bad_words: np.ndarray
    recent: np.ndarray


def _padded(ids: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    padded = np.full(length, NO_TOKEN, np.int32)
    padded[: len(ids)] = ids
    return padded


def _right_aligned(ids: Sequence[int], length: int) -> np.ndarray:
    aligned = np.full(length, NO_TOKEN, np.int32)
    kept = ids[-length:]
    aligned[length - len(kept) :] = kept
    return aligned


def _contents(request: Request, row: int, output_token_ids: Sequence[int], num_stop_ids: int) -> _RowContents:
    params = request.params
    bias = params.logit_bias or {}
    values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    values[: len(bias)] = list(bias.values())
    several = [word for word in request.bad_word_ids if len(word) > 1]
    table = np.full((MAX_BAD_WORD_SEQUENCES, MAX_BAD_WORD_TOKENS), NO_TOKEN, np.int32)
    for i, word in enumerate(several):
        table[i] = _right_aligned(word, MAX_BAD_WORD_TOKENS)
    return _RowContents(
        row=np.int32(row),
        allowed=_padded(params.allowed_token_ids or (), MAX_ALLOWED_TOKEN_IDS),
        bias_ids=_padded(tuple(bias), MAX_LOGIT_BIAS),
        bias_values=values,
        banned=_padded([word[0] for word in request.bad_word_ids if len(word) == 1], MAX_BAD_WORD_SEQUENCES),
        stop_ids=_padded(stop_ids_of(request), num_stop_ids),
        bad_words=table,
        recent=_right_aligned(output_token_ids, NUM_RECENT),
    )


@partial(jax.jit, donate_argnames="state")
def _write_row(state: SamplerState, contents: _RowContents) -> SamplerState:
    vocab_size = state.bias.shape[1]

    def index(ids: jax.typing.ArrayLike) -> jax.Array:
        # Padding goes out of range, and so is dropped; -1 would be the last token.
        return jnp.where(jnp.asarray(ids) < 0, vocab_size, ids)

    start = jnp.where(jnp.any(contents.allowed >= 0), -jnp.inf, 0.0)
    bias = jnp.full((vocab_size,), start, jnp.float32).at[index(contents.allowed)].set(0.0, mode="drop")
    bias = bias.at[index(contents.bias_ids)].add(contents.bias_values, mode="drop")
    bias = bias.at[index(contents.banned)].set(-jnp.inf, mode="drop")
    row = contents.row
    return SamplerState(
        token_info=state.token_info.at[row].set(0),
        bias=state.bias.at[row].set(bias),
        stop_ids=state.stop_ids.at[row].set(contents.stop_ids),
        bad_words=state.bad_words.at[row].set(contents.bad_words),
        recent=state.recent.at[row].set(contents.recent),
    )


@partial(jax.jit, donate_argnames="state")
def _add_history(
    state: SamplerState, row: np.int32, tokens: np.ndarray, num_prompt: np.int32, num_tokens: np.int32
) -> SamplerState:
    """Enter one chunk of tokens, int32[1024]: `num_prompt` of the prompt, outputs up to `num_tokens`, padding."""
    vocab_size = state.bias.shape[1]
    at = jnp.arange(HISTORY_CHUNK, dtype=jnp.int32)
    prompt = jnp.where(at < num_prompt, tokens, vocab_size)
    outputs = jnp.where((at >= num_prompt) & (at < num_tokens), tokens, vocab_size)
    token_info = state.token_info.at[row, prompt].set(IN_PROMPT, mode="drop")
    return replace(state, token_info=token_info.at[row, outputs].add(1, mode="drop"))


def reset_row(state: SamplerState, row: int, request: Request, output_token_ids: Sequence[int] = ()) -> SamplerState:
    """Set a row for a request that takes it over: at admission, and after preemption with the outputs so far.

    Device calls of fixed shape: one, and with penalties one more per 1024 tokens of prompt and outputs.

    Args:
        state: donated.
        row: row that the request owns from now on.
        request: one that `needs_state`, and whose bad words passed `check_constraints`.
        output_token_ids: every token sampled so far; none may be pending on the device.

    Returns:
        The new state.
    """
    state = _write_row(state, _contents(request, row, output_token_ids, state.stop_ids.shape[1]))
    if not flags_of(request.params, (), ()) & Flag.PENALTIES:
        return state
    # Prompt tokens matter to the repetition penalty alone; the prompt may be long.
    prompt = request.prompt_token_ids if request.params.repetition_penalty != 1.0 else ()
    tokens = np.array([*prompt, *output_token_ids], np.int32)
    for start in range(0, len(tokens), HISTORY_CHUNK):
        chunk = tokens[start : start + HISTORY_CHUNK]
        num_prompt = min(max(len(prompt) - start, 0), len(chunk))
        padded = _padded(chunk, HISTORY_CHUNK)
        state = _add_history(state, np.int32(row), padded, np.int32(num_prompt), np.int32(len(chunk)))
    return state


def warm_up_rows(state: SamplerState) -> SamplerState:
    """Compile what `reset_row` runs, on the padding row, so that no request waits for it. Donates the state."""
    row = np.int32(state.padding_row)
    empty = _RowContents(
        row=row,
        allowed=_padded((), MAX_ALLOWED_TOKEN_IDS),
        bias_ids=_padded((), MAX_LOGIT_BIAS),
        bias_values=np.zeros(MAX_LOGIT_BIAS, np.float32),
        banned=_padded((), MAX_BAD_WORD_SEQUENCES),
        stop_ids=_padded((), state.stop_ids.shape[1]),
        bad_words=np.full((MAX_BAD_WORD_SEQUENCES, MAX_BAD_WORD_TOKENS), NO_TOKEN, np.int32),
        recent=_padded((), NUM_RECENT),
    )
    state = _write_row(state, empty)
    return _add_history(state, row, _padded((), HISTORY_CHUNK), np.int32(0), np.int32(0))


def advance(state: SamplerState, inputs: SamplingInputs, tokens: jax.Array) -> SamplerState:
    """Count the sampled tokens, int32[S], in the rows that ask for it. Part of the jitted step."""
    counted = jnp.where(inputs.has(Flag.PENALTIES), inputs.row, state.padding_row)
    remembered = jnp.where(inputs.has(Flag.BAD_WORDS), inputs.row, state.padding_row)
    recent = jnp.concatenate([state.recent[remembered, 1:], tokens[:, None]], axis=1)
    return replace(
        state,
        token_info=state.token_info.at[counted, tokens].add(1),
        recent=state.recent.at[remembered].set(recent),
    )
