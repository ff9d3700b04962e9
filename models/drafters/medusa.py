"""Medusa: heads side by side on the target's last hidden state (Cai et al. 2024, arXiv 2401.10774, section 2.1.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.decoder import Table
from models.drafters.config import MedusaConfig
from models.drafters.vocab import TargetIds, spread
from models.layers.basic import Linear
from models.layers.product import product_with_rows


class MedusaHeads(nnx.Module):
    """Head i: residual blocks `x + silu(linear(x))`, then an output head.

    Args:
        config: of the heads.
        dtype: of activations and weights.
        matmul: implementation of products with packed weights.
    """

    def __init__(self, config: MedusaConfig, *, dtype: str, matmul: str = "auto") -> None:
        size = config.hidden_size

        def block() -> Linear:
            return Linear(size, size, bias=config.bias, dtype=dtype, matmul=matmul)

        self.blocks = nnx.List([nnx.List([block() for _ in range(config.num_layers)]) for _ in range(config.num_heads)])
        count = 1 if config.shared_head else config.num_heads
        self.heads = nnx.List([Table(config.draft_vocab_size, size, dtype=dtype) for _ in range(count)])
        self.target_ids = TargetIds(config.draft_vocab_size) if config.maps_vocab else None
        self.config = config
        self.matmul = matmul

    def logits(self, hidden: jax.Array, head: int) -> jax.Array:
        """The target's hidden states [S, E] after the final norm -> float32[S, V]: head i guesses the token i + 1
        places after the one that the target itself would sample there; -inf for tokens that the heads do not know.
        """
        x = hidden
        for block in self.blocks[head]:
            x = x + jax.nn.silu(block(x).astype(jnp.float32)).astype(x.dtype)
        table = self.heads[0 if self.config.shared_head else head]
        logits = product_with_rows(x, table.weight.get_value(), jnp.float32, self.matmul)
        return spread(logits, self.target_ids, self.config.vocab_size)
