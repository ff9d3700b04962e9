"""Linear, RMSNorm, gated MLP. Weights are `nnx.Param`s named as in `models.parameters`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.layers.product import Weight, product
from pallas_kernels.rowwise import add_norm, gate, norm


class Linear(nnx.Module):
    """`x @ weight (+ bias)`, weight `[in, out]`: whatever `product` multiplies with.

    Args:
        num_in, num_out: sizes.
        bias: whether there is one.
        dtype: of activations, and of weights that are not packed.
        matmul: implementation of products with packed weights.
    """

    def __init__(self, num_in: int, num_out: int, *, bias: bool, dtype: str, matmul: str) -> None:
        self.weight: nnx.Param[Weight] = nnx.Param(jnp.zeros((num_in, num_out), dtype))
        self.bias = nnx.Param(jnp.zeros((num_out,), dtype)) if bias else None
        self.matmul = matmul

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, in] -> [T, out]."""
        y = product(x, self.weight.get_value(), self.matmul)
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467) over the last axis, in float32."""

    def __init__(self, size: int, *, eps: float, dtype: str) -> None:
        self.weight = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] -> same."""
        return norm(x, self.weight[...], self.eps)

    def of_sum(self, x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[T, size] twice -> the norm of the sum, and the sum."""
        return add_norm(x, residual, self.weight[...], self.eps)


class GatedMlp(nnx.Module):
    """`down(act(gate(x)) * up(x))` with gate and up in one product (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype: str, matmul: str) -> None:
        model, ffn, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(model, 2 * ffn, bias=bias, dtype=dtype, matmul=matmul)
        self.down = Linear(ffn, model, bias=bias, dtype=dtype, matmul=matmul)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, E] -> [T, E]."""
        return self.down(gate(self.gate_up(x), self.activation))
