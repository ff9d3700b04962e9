"""`LayerSkip`: the model drafts for itself, with some of its layers left out, or with its weights packed, or both.

    kept layers    drafting: keys and values of the model's own pages are read, those of drafts are written there
    all layers     verification: the same positions are written again, exactly

Weights and pages are the model's, so there is nothing to catch up and no memory to find. The pages of a kept layer hold
what the whole model computed for the accepted tokens, which is better than what the shortened one would have. The idea
is that of Draft & Verify (Zhang et al. 2023, arXiv 2309.08168) and LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.runtime.drafting.drafter import DeviceDrafter, Drafted, DraftRows
from engine.runtime.drafting.loop import draft_tokens
from engine.runtime.sampling.inputs import SamplerVariant
from models.decoder import Decoder
from models.functional import FunctionalModel, Params
from pallas_kernels.kv_layout import Pages

LAYERS = "layers."


class LayerSkip(DeviceDrafter):
    """See the module.

    Args:
        short: a decoder of the kept layers alone.
        params: of the whole model; for drafting only if they are a packed copy (`quantized.py`).
        kept: indices of the layers that are computed, ascending.
    """

    def __init__(self, short: FunctionalModel[Decoder], params: Params, kept: Sequence[int]) -> None:
        self._short, self._kept = short, tuple(kept)
        self.weights = keep_layers(params, kept)

    def draft(
        self, weights: Any, state: Any, cache: tuple[Pages, ...], rows: DraftRows, count: int, variant: SamplerVariant
    ) -> Drafted:
        """See `DeviceDrafter`."""
        pages = tuple(cache[index] for index in self._kept)
        ids, pages = draft_tokens(self._short.bind(weights), pages, rows, count, variant, own_cache=False)
        whole = list(cache)
        for index, one in zip(self._kept, pages, strict=True):
            whole[index] = one
        return Drafted(ids, tuple(whole), state)


def keep_layers(params: Params, kept: Sequence[int]) -> Params:
    """The parameters of a decoder that has only the layers `kept`, under its own names. Arrays are shared."""
    places = {index: place for place, index in enumerate(kept)}
    chosen: Params = {}
    for name, weight in params.items():
        if not name.startswith(LAYERS):
            chosen[name] = weight
            continue
        index, rest = name[len(LAYERS) :].split(".", 1)
        if int(index) in places:
            chosen[f"{LAYERS}{places[int(index)]}.{rest}"] = weight
    return chosen
