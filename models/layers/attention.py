"""Grouped-query attention over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from models.config import LayerConfig, ModelConfig
from models.layers.basic import Linear, RMSNorm
from pallas_kernels.kv_layout import Pages
from pallas_kernels.kv_write import kv_write
from pallas_kernels.paged_attention import AttentionProblem, paged_attention
from pallas_kernels.rowwise import Heads, heads


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepContext:
    """What all layers of one step share: computed once, before the first.

    Attributes:
        cos, sin: float32[T, rotary_dim], see `rope.cos_sin`.
        slots: int32[T], where this step's keys and values go.
        plan: the attention plan.
    """

    cos: jax.Array
    sin: jax.Array
    slots: jax.Array
    plan: Any


class Attention(nnx.Module):
    """Causal self-attention; sliding window, rope and q/k norm as the layer's config says.

    Args:
        config, layer, problem, dtype, matmul: as of the decoder.
        num_in: width of the input, if it is not the model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: LayerConfig,
        problem: AttentionProblem,
        *,
        dtype: str,
        matmul: str,
        num_in: int | None = None,
    ) -> None:
        model, qkv = config.hidden_size, config.q_size + 2 * config.kv_size
        self.qkv = Linear(model if num_in is None else num_in, qkv, bias=config.qkv_bias, dtype=dtype, matmul=matmul)
        self.o = Linear(config.q_size, model, bias=config.o_bias, dtype=dtype, matmul=matmul)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.layer = layer
        self.problem = problem

    def __call__(self, x: jax.Array, pages: Pages, step: StepContext) -> tuple[jax.Array, Pages]:
        """[T, in] and this layer's pages -> [T, E] and the pages with this step's keys and values."""
        problem, dim, norms, eps = self.problem, self.problem.head_dim, None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            norms, eps = (self.q_norm.weight[...], self.k_norm.weight[...]), self.q_norm.eps
        turned = (step.cos, step.sin) if self.layer.use_rope else None
        q, k, v = heads(self.qkv(x), Heads(problem.num_heads, problem.num_kv_heads, dim), turned, norms, eps)
        pages = kv_write(pages, k, v, step.slots)
        out = paged_attention(q, pages, step.plan, problem, scale=dim**-0.5, window=self.layer.window)
        return self.o(out.reshape(x.shape[0], -1)), pages
