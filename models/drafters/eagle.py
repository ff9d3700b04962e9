"""EAGLE and EAGLE-3: a small decoder that foresees the target's features (arXiv 2401.15077, 2503.01840).

    position           p            p + 1
    target's states    h[p]         h[p+1]
    reads              h[p], t[p+1]  h[p+1], t[p+2]     t: tokens; one place on, since the state does not know it
    gives              f[p+1]        f[p+2]             in place of h[p+1], h[p+2] when they are not there yet
    guesses            t[p+2]        t[p+3]

Row p of the head's own KV cache belongs to the target's position p. While the target's states are known, the head is
fed with them; to guess on, with its own output.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import LayerConfig
from models.decoder import Block, Decoder, Table
from models.drafters.config import EagleConfig
from models.drafters.vocab import TargetIds, spread
from models.functional import call_shared
from models.layers.attention import Attention, StepContext
from models.layers.basic import GatedMlp, Linear, RMSNorm
from models.layers.product import product_with_rows
from models.layers.rope import cos_sin
from pallas_kernels.kv_layout import Pages
from pallas_kernels.kv_write import slots_of
from pallas_kernels.paged_attention import AttentionProblem, plan_attention
from pallas_kernels.ragged import RaggedBatch


class FirstLayer(nnx.Module):
    """Attention and MLP. EAGLE: no norm in front. EAGLE-3: attention reads the embedding and the feature, normed apart.

    Args:
        config, problem, dtype, matmul: as of `EagleHead`.
    """

    def __init__(self, config: EagleConfig, problem: AttentionProblem, *, dtype: str, matmul: str) -> None:
        decoder = config.decoder
        size, eps, joined = decoder.hidden_size, decoder.rms_norm_eps, config.is_eagle3
        self.embed_norm = RMSNorm(size, eps=eps, dtype=dtype) if joined else None
        self.hidden_norm = RMSNorm(size, eps=eps, dtype=dtype) if joined else None
        width = 2 * size if joined else size
        self.attn = Attention(decoder, LayerConfig(), problem, dtype=dtype, matmul=matmul, num_in=width)
        self.mlp_norm = RMSNorm(size, eps=eps, dtype=dtype)
        self.mlp = GatedMlp(decoder, dtype=dtype, matmul=matmul)
        self.norm_before_residual = config.norm_before_residual

    def __call__(self, embedded: jax.Array, x: jax.Array, pages: Pages, step: StepContext) -> tuple[jax.Array, Pages]:
        """Embeddings [T, E] (EAGLE: not read), features [T, E] and the layer's pages -> features and pages."""
        read = x
        if self.embed_norm is not None and self.hidden_norm is not None:
            normed = self.hidden_norm(x)
            read = jnp.concatenate([self.embed_norm(embedded), normed], axis=-1)
            x = normed if self.norm_before_residual else x
        attended, pages = self.attn(read, pages, step)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), pages


class EagleHead(nnx.Module):
    """An EAGLE or EAGLE-3 head over its own paged KV cache.

    Args:
        config: what it is.
        problem: of its attention.
        dtype: of activations and weights.
        matmul: implementation of products with packed weights.
    """

    def __init__(self, config: EagleConfig, problem: AttentionProblem, *, dtype: str, matmul: str = "auto") -> None:
        decoder = config.decoder
        size, vocab = decoder.hidden_size, decoder.vocab_size
        num_in = len(config.taps) * config.target_hidden_size if config.is_eagle3 else 2 * size
        self.embed = Table(vocab, size, dtype=dtype) if config.own_embed else None
        self.fc = Linear(num_in, size, bias=config.fc_bias, dtype=dtype, matmul=matmul)
        self.first = FirstLayer(config, problem, dtype=dtype, matmul=matmul)
        self.rest = nnx.List(
            [Block(decoder, layer, problem, dtype=dtype, matmul=matmul) for layer in decoder.layers[1:]]
        )
        self.norm = RMSNorm(size, eps=decoder.rms_norm_eps, dtype=dtype) if config.is_eagle3 else None
        self.head = Table(config.draft_vocab_size, size, dtype=dtype) if config.own_head else None
        self.target_ids = TargetIds(config.draft_vocab_size) if config.maps_vocab else None
        self.config = config
        self.problem = problem
        self.matmul = matmul

    def features(self, states: jax.Array) -> jax.Array:
        """What the target gives -> what the head reads, [T, E]: EAGLE reads final hidden states as they are, EAGLE-3
        projects the streams of its taps, [T, taps * E] (`Decoder.run_tapped`).
        """
        return self.fc(states) if self.config.is_eagle3 else states

    def __call__(
        self,
        target: Decoder,
        token_ids: jax.Array,
        features: jax.Array,
        positions: jax.Array,
        batch: RaggedBatch,
        cache: tuple[Pages, ...],
    ) -> tuple[jax.Array, tuple[Pages, ...]]:
        """Run one ragged batch.

        Args:
            target: lends its embedding table.
            token_ids: int32[T], the token after each position.
            features: [T, E] of each position, from `features` or from the last call.
            positions: int32[T].
            batch: where the rows' keys and values go, and what they see.
            cache: pages of each of the head's layers.

        Returns:
            Features [T, E] of the positions one on, and the cache.
        """
        num_tokens, decoder = token_ids.shape[0], self.config.decoder
        cos, sin = cos_sin(decoder.rope, positions)
        step = StepContext(
            cos=cos,
            sin=sin,
            slots=slots_of(batch, num_tokens, self.problem.page_size),
            plan=plan_attention(batch, num_tokens, self.problem),
        )
        table = target.embed if self.embed is None else self.embed
        embedded, x = table.weight[...][token_ids], features
        if not self.config.is_eagle3:
            x = self.fc(jnp.concatenate([embedded, features], axis=-1))
        x, first = self.first(embedded, x, cache[0], step)
        new_cache = [first]
        for block, pages in zip(self.rest, cache[1:], strict=True):
            x, pages = call_shared(block, x, pages, step)
            new_cache.append(pages)
        return x, tuple(new_cache)

    def logits(self, target: Decoder, features: jax.Array) -> jax.Array:
        """Features [S, E] that the head gave -> float32[S, V] of the guess, -inf for tokens that it does not know."""
        x = features if self.norm is None else self.norm(features)
        if self.head is None:
            return target.logits(x)
        logits = product_with_rows(x, self.head.weight.get_value(), jnp.float32, self.matmul)
        return spread(logits, self.target_ids, self.config.decoder.vocab_size)
