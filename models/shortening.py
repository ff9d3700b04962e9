"""Which layers a decoder can spare: how often it names the same next token without them.

One function runs the decoder with any of its layers left out, so that a hundred choices take one compilation. Removing
layers one by one, each time the one that is missed least, is the plain form of what Draft & Verify (Zhang et al. 2023,
arXiv 2309.08168) searches for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.decoder import Decoder
from models.functional import FunctionalModel, Params, call_shared
from models.inputs import ForwardInputs
from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.paged_attention import AttentionProblem
from pallas_kernels.ragged import RaggedBatch

PAGE_SIZE = 16
MOST_CANDIDATES = 8  # layers that are tried in a round after the first: those that were missed least before


@dataclass(frozen=True)
class Shortened:
    """A choice of layers.

    Attributes:
        kept: their indices, ascending.
        agreement: share of the tokens for which the shortened decoder's likeliest next token is the whole one's.
    """

    kept: tuple[int, ...]
    agreement: float


def shorten(
    config: ModelConfig, params: Params, windows: np.ndarray, progress: Callable[[int, int], None]
) -> Iterator[Shortened]:
    """Remove layers one by one, down to half of them.

    Args:
        config: the decoder.
        params: its weights; activations are of the dtype of the final norm's.
        windows: int32[W, L], a text.
        progress: called with layers removed and to be removed.

    Yields:
        The best choice found with each number of layers, most layers first.
    """
    likeliest = _runner(config, str(jax.tree.leaves(params["norm.weight"])[0].dtype))
    gates = np.ones(config.num_layers, bool)
    whole = [np.asarray(likeliest(params, window, gates)) for window in windows]

    def agreement(without: int) -> float:
        chosen = gates.copy()
        chosen[without] = False
        same = [np.asarray(likeliest(params, w, chosen)) == full for w, full in zip(windows, whole, strict=True)]
        return float(np.mean(same))

    known = {layer: agreement(layer) for layer in range(config.num_layers)}  # when it was tried last
    rounds = config.num_layers // 2
    for done in range(rounds):
        if done > 0:
            for layer in sorted(known, key=known.__getitem__, reverse=True)[:MOST_CANDIDATES]:
                known[layer] = agreement(layer)
        layer = max(known, key=known.__getitem__)
        best = known.pop(layer)
        gates[layer] = False
        progress(done + 1, rounds)
        yield Shortened(tuple(np.flatnonzero(gates).tolist()), best)


def _runner(config: ModelConfig, dtype: str) -> Callable[[Params, np.ndarray, np.ndarray], jax.Array]:
    """A function of parameters, int32[L] and bool[layers] to the likeliest next tokens, int32[L]."""
    problem = AttentionProblem(config.num_heads, config.num_kv_heads, config.head_dim, PAGE_SIZE, dtype, dtype)
    model = FunctionalModel(lambda: Decoder(config, problem, dtype=dtype))

    @jax.jit
    def run(params: Params, ids: jax.Array, gates: jax.Array) -> jax.Array:
        length = ids.shape[0]
        num_pages = -(-length // PAGE_SIZE)
        layout = KVLayout(num_pages + 1, config.num_kv_heads, PAGE_SIZE, config.head_dim, dtype)  # page 0 is nobody's
        batch = RaggedBatch(
            query_start=jnp.asarray([0, length], jnp.int32),
            context_lens=jnp.asarray([length], jnp.int32),
            block_tables=jnp.arange(1, num_pages + 1, dtype=jnp.int32)[None],
            num_seqs=jnp.asarray(1, jnp.int32),
        )
        rows = jnp.arange(length, dtype=jnp.int32)
        decoder = model.bind(params)
        step = decoder.step_context(ForwardInputs(ids, rows, rows, batch))
        x = decoder.embed.weight[...][ids]
        for index, block in enumerate(decoder.layers):
            after, _ = call_shared(block, x, layout.empty(), step)
            x = jnp.where(gates[index], after, x)
        return jnp.argmax(decoder.logits(decoder.norm(x)), axis=-1).astype(jnp.int32)

    return lambda params, ids, gates: run(params, jnp.asarray(ids, jnp.int32), jnp.asarray(gates))
