"""Layers that a decoder can spare, on a tiny model one of whose layers does nothing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from models.loading.load import load_model
from models.shortening import shorten
from tests.engine.helpers import TINY


def test_a_layer_that_does_nothing_goes_first() -> None:
    loaded = load_model(TINY / "llama", "auto", "float32", 0, lambda done, total, what: None, None)
    params = dict(loaded.params)
    for name in ("layers.1.attn.o.weight", "layers.1.mlp.down.weight"):
        params[name] = jnp.zeros_like(params[name])  # its block adds nothing to the residual stream
    windows = np.random.default_rng(0).integers(3, loaded.config.vocab_size, (2, 40)).astype(np.int32)
    seen: list[tuple[int, int]] = []
    (found,) = shorten(loaded.config, params, windows, lambda done, total: seen.append((done, total)))
    assert found.kept == (0, 2) and found.agreement == 1.0
    assert seen == [(1, 1)]
