"""`ForwardInputs`: what a decoder needs to know of one step besides weights and cache."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from pallas_kernels.ragged import RaggedBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardInputs:
    """One ragged batch of tokens.

    Attributes:
        token_ids: int32[T], padding is 0.
        positions: int32[T], absolute; padding is 0.
        logit_rows: int32[S], the token row whose hidden state feeds the head, per sequence.
        batch: lengths, offsets and block tables of the sequences.
    """

    token_ids: jax.Array
    positions: jax.Array
    logit_rows: jax.Array
    batch: RaggedBatch
