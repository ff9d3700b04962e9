"""Everything that persists on the device between steps. Donated from call to call, never copied.

Two parts, because the two executables of a step own different ones: the forward pass advances the cache and the block
tables, sampling advances the last tokens and the sampler's counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from engine.runtime.sampling import SamplerState
from pallas_kernels.kv_layout import KVLayout, Pages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardState:
    """What the forward pass advances.

    Attributes:
        cache: pages of each layer.
        block_tables: int32[R+1, B], page ids of the sequence in each row; the last row is padding's.
    """

    cache: tuple[Pages, ...]
    block_tables: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowTokens:
    """What each row knows of its sequence, before the host does.

    Attributes:
        last_token: int32[R+1], the token that each row sampled last.
        num_known: int32[R+1], tokens of the sequence, that one included.
    """

    last_token: jax.Array
    num_known: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleState:
    """What sampling advances.

    Attributes:
        rows: the last token of each row's sequence, and how many it has.
        sampler: counts, biases and stop ids of the rows that need them.
    """

    rows: RowTokens
    sampler: SamplerState


def make_forward_state(layout: KVLayout, num_layers: int, num_rows: int, max_blocks: int) -> ForwardState:
    """Zeroed state for R rows of at most B blocks."""
    cache = tuple(layout.empty() for _ in range(num_layers))
    return ForwardState(cache, jnp.zeros((num_rows + 1, max_blocks), jnp.int32))


def make_sample_state(num_rows: int, sampler: SamplerState) -> SampleState:
    """Zeroed tokens for R rows."""
    return SampleState(RowTokens(*(jnp.zeros((num_rows + 1,), jnp.int32) for _ in range(2))), sampler)
