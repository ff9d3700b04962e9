"""Heads that know some of the target's tokens only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class TargetIds(nnx.Module):
    """int32[D]: which of the target's tokens each of the head's is."""

    def __init__(self, size: int) -> None:
        self.ids = nnx.Param(jnp.zeros((size,), jnp.int32))


def spread(logits: jax.Array, target_ids: TargetIds | None, vocab_size: int) -> jax.Array:
    """float32[S, D] of the head's tokens -> float32[S, V] of the target's, -inf elsewhere."""
    if target_ids is None:
        return logits
    nothing = jnp.full((logits.shape[0], vocab_size), -jnp.inf, logits.dtype)
    return nothing.at[:, target_ids.ids[...]].set(logits, unique_indices=True)
