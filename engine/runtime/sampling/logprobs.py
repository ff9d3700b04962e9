"""Log-probabilities of the raw distribution: log_softmax of the logits before any processing, as vLLM's
`raw_logprobs`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from engine.runtime.sampling.vocab import top_k

NUM_TOP = 20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogprobArrays:
    """One token and the most probable ones, at N positions.

    Attributes:
        logprob: float32[N], of the token.
        rank: int32[N], 1 + the number of tokens that are more probable.
        top_ids: int32[N, K], the most probable tokens, best first, equals in order of their id.
        top_logprobs: float32[N, K].
    """

    logprob: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def _log_normaliser(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1)


def token_logprobs(logits: jax.Array, token_ids: jax.Array, num_top: int = NUM_TOP) -> LogprobArrays:
    """Logprob and rank of given tokens, and the top of their distributions.

    Args:
        logits: [N, V], raw.
        token_ids: int32[N].
        num_top: static; K is this or V, whichever is less.
    """
    logits = logits.astype(jnp.float32)
    normaliser = _log_normaliser(logits)
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=-1)
    best, ids = top_k(logits, min(num_top, logits.shape[1]))
    return LogprobArrays(
        logprob=chosen[:, 0] - normaliser,
        rank=1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32),
        top_ids=ids,
        top_logprobs=best - normaliser[:, None],
    )


@partial(jax.jit, static_argnames="num_top")
def prompt_logprobs(logits: jax.Array, target_ids: jax.Array, num_top: int = NUM_TOP) -> LogprobArrays:
    """Logprobs of a chunk of prompt positions.

    Args:
        logits: float32[C, V]; those of position p predict the token of position p + 1.
        target_ids: int32[C], that next token; padding may be any id of the vocabulary.
        num_top: static.
    """
    return token_logprobs(logits, target_ids, num_top)


@jax.jit
def full_logprobs(logits: jax.Array) -> jax.Array:
    """Logprobs of the whole vocabulary, float32[N, V], for requests with logprobs=-1 or more than `num_top`."""
    logits = logits.astype(jnp.float32)
    return logits - _log_normaliser(logits)[:, None]
