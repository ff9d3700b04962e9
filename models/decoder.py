"""The decoder: Embed -> Blocks -> Norm -> Head, built from a `ModelConfig` and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import LayerConfig, ModelConfig
from models.functional import call_shared
from models.inputs import ForwardInputs
from models.layers.attention import Attention, StepContext
from models.layers.basic import GatedMlp, RMSNorm
from models.layers.product import Weight, product_with_rows
from models.layers.rope import cos_sin
from pallas_kernels.kv_layout import Pages
from pallas_kernels.kv_write import slots_of
from pallas_kernels.paged_attention import AttentionProblem, plan_attention


class Block(nnx.Module):
    """Pre-norm block: attention and gated MLP, each added to the residual stream."""

    def __init__(
        self, config: ModelConfig, layer: LayerConfig, problem: AttentionProblem, *, dtype: str, matmul: str
    ) -> None:
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attn = Attention(config, layer, problem, dtype=dtype, matmul=matmul)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = GatedMlp(config, dtype=dtype, matmul=matmul)

    def __call__(self, x: jax.Array, pages: Pages, step: StepContext) -> tuple[jax.Array, Pages]:
        """[T, E] and this layer's pages -> both, advanced."""
        attended, pages = self.attn(self.attn_norm(x), pages, step)
        normed, x = self.mlp_norm.of_sum(x, attended)
        return x + self.mlp(normed), pages


class Table(nnx.Module):
    """A `[V, E]` matrix: embedding table and head."""

    def __init__(self, num_rows: int, size: int, *, dtype: str) -> None:
        self.weight: nnx.Param[Weight] = nnx.Param(jnp.zeros((num_rows, size), dtype))


class Decoder(nnx.Module):
    """A decoder-only transformer over a paged KV cache.

    Args:
        config: what it is.
        problem: of attention; names its implementation.
        dtype: of activations, and of weights that are not packed.
        matmul: implementation of products with packed weights.
    """

    def __init__(self, config: ModelConfig, problem: AttentionProblem, *, dtype: str, matmul: str = "auto") -> None:
        self.embed = Table(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nnx.List([Block(config, layer, problem, dtype=dtype, matmul=matmul) for layer in config.layers])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.head = None if config.tie_word_embeddings else Table(config.vocab_size, config.hidden_size, dtype=dtype)
        self.config = config
        self.problem = problem
        self.matmul = matmul

    def __call__(self, inputs: ForwardInputs, cache: tuple[Pages, ...]) -> tuple[jax.Array, tuple[Pages, ...]]:
        """Run one ragged batch.

        Args:
            inputs: T token rows of S sequences.
            cache: pages of each layer, `[N, 2, K, P, D]`.

        Returns:
            Hidden states `[T, E]` after the final norm, and the cache with this step's keys and values.
        """
        hidden, _, cache = self.run_tapped(inputs, cache, ())
        return hidden, cache

    def run_tapped(
        self, inputs: ForwardInputs, cache: tuple[Pages, ...], taps: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array | None, tuple[Pages, ...]]:
        """The same, with what flows between chosen layers.

        Args:
            inputs, cache: as above.
            taps: numbers of layers, ascending: the residual stream after so many is wanted too.

        Returns:
            Hidden states `[T, E]`; the streams side by side, `[T, len(taps) * E]`, None without taps; the cache.
        """
        step = self.step_context(inputs)
        x = self.embed.weight[...][inputs.token_ids]
        new_cache, streams = [], [x]
        for block, pages in zip(self.layers, cache, strict=True):
            x, pages = call_shared(block, x, pages, step)
            new_cache.append(pages)
            streams.append(x)
        tapped = jnp.concatenate([streams[tap] for tap in taps], axis=-1) if taps else None
        return self.norm(x), tapped, tuple(new_cache)

    def step_context(self, inputs: ForwardInputs) -> StepContext:
        """What all layers share of a batch."""
        num_tokens = inputs.token_ids.shape[0]
        cos, sin = cos_sin(self.config.rope, inputs.positions)
        return StepContext(
            cos=cos,
            sin=sin,
            slots=slots_of(inputs.batch, num_tokens, self.problem.page_size),
            plan=plan_attention(inputs.batch, num_tokens, self.problem),
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[S, E] -> float32[S, V]."""
        table = self.embed if self.head is None else self.head
        return product_with_rows(hidden, table.weight.get_value(), jnp.float32, self.matmul)
