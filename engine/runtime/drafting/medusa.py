"""`MedusaDrafter`: Medusa heads on the model's last hidden state. No cache, no loop: all guesses at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from engine.runtime.drafting.drafter import DeviceDrafter, Drafted, DraftRows
from engine.runtime.drafting.loop import choose_tokens
from engine.runtime.drafting.recent import RecentStates, no_states, recall, remember
from engine.runtime.packing import TokenRows
from engine.runtime.sampling.inputs import SamplerVariant
from models.drafters.medusa import MedusaHeads
from models.functional import FunctionalModel, Params
from pallas_kernels.kv_layout import Pages


class MedusaDrafter(DeviceDrafter):
    """See the module.

    Args:
        heads: their structure.
        params: their weights.
        num_drafts: K, at most as many as there are heads.
        hidden_size: E of the model.
        dtype: of its hidden states.
    """

    observes = True

    def __init__(
        self, heads: FunctionalModel[MedusaHeads], params: Params, num_drafts: int, hidden_size: int, dtype: str
    ) -> None:
        self.weights = params
        self.extra_bytes = sum(array.on_device_size_in_bytes() for array in jax.tree.leaves(params))
        self._heads, self._num_drafts, self._hidden_size, self._dtype = heads, num_drafts, hidden_size, dtype

    def make_state(self, num_pages: int, num_rows: int) -> RecentStates:
        """See `DeviceDrafter`."""
        del num_pages
        return no_states(num_rows, self._num_drafts + 1, self._hidden_size, self._dtype)

    def observe(self, weights: Any, state: RecentStates, rows: TokenRows, hidden: jax.Array) -> RecentStates:
        """See `DeviceDrafter`."""
        del weights
        return remember(state, rows, hidden)

    def draft(
        self,
        weights: Any,
        state: RecentStates,
        cache: tuple[Pages, ...],
        rows: DraftRows,
        count: int,
        variant: SamplerVariant,
    ) -> Drafted:
        """See `DeviceDrafter`. The state that the last token was sampled from is that of the position before it."""
        heads = self._heads.bind(weights)
        hidden, _ = recall(state, rows.rows, rows.num_known - 2)
        ids = [choose_tokens(heads.logits(hidden, head), rows, head, variant) for head in range(count)]
        return Drafted(jnp.stack(ids, axis=1), cache, state)
