"""One block of the decoder as plain functions of float32 arrays, on whole sequences.

The decoder's own layers work on a paged cache and in the dtype that is served; here attention is dense, causal within
each sequence, and everything can be differentiated. A test holds both equal.

    weights: parameter of the layer ("attn.qkv.weight", …) -> float32, matrices [in, out]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from models.config import LayerConfig, ModelConfig
from models.layers.rope import cos_sin
from models.quantizer.types import Made
from pallas_kernels.rowwise import rotate

MATRICES = ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")
Weights = Mapping[str, jax.Array]


@dataclass(frozen=True)
class BlockRunner:
    """The static side of one layer; equal ones share what is compiled.

    Attributes:
        config: of the decoder.
        layer: of this one.
    """

    config: ModelConfig
    layer: LayerConfig

    def forward(self, weights: Weights, x: jax.Array) -> jax.Array:
        """[S, L, E] -> [S, L, E]."""
        return _forward(self, weights, x)[0]

    def inputs(self, weights: Weights, x: jax.Array) -> dict[str, jax.Array]:
        """Matrix -> its inputs [S, L, in]."""
        return _forward(self, weights, x)[1]


@partial(jax.jit, static_argnums=0)
def _forward(runner: BlockRunner, weights: Weights, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    config, inputs = runner.config, {}

    def multiply(name: str, value: jax.Array) -> jax.Array:
        inputs[name] = value
        product = value @ weights[f"{name}.weight"]
        return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product

    qkv = multiply("attn.qkv", _normed(x, weights["attn_norm.weight"], config))
    x = x + multiply("attn.o", _attend(runner, weights, qkv))
    gate, up = jnp.split(multiply("mlp.gate_up", _normed(x, weights["mlp_norm.weight"], config)), 2, axis=-1)
    gate = jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, config.activation == "gelu_tanh")
    return x + multiply("mlp.down", gate * up), inputs


def _normed(x: jax.Array, weight: jax.Array, config: ModelConfig) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * weight


def _attend(runner: BlockRunner, weights: Weights, qkv: jax.Array) -> jax.Array:
    """[S, L, (H + 2K) D] -> [S, L, H D]."""
    config, (num_seqs, length, _) = runner.config, qkv.shape
    q, k, v = jnp.split(qkv, [config.q_size, config.q_size + config.kv_size], axis=-1)
    q, k, v = (part.reshape(num_seqs, length, -1, config.head_dim) for part in (q, k, v))
    if config.qk_norm:
        q = _normed(q, weights["attn.q_norm.weight"], config)
        k = _normed(k, weights["attn.k_norm.weight"], config)
    positions = jnp.arange(length)
    if runner.layer.use_rope:
        turn = jax.vmap(partial(rotate), in_axes=(0, None, None))
        cos, sin = cos_sin(config.rope, positions, "xla")
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    group = config.num_heads // config.num_kv_heads
    q = q.reshape(num_seqs, length, config.num_kv_heads, group, config.head_dim)
    scores = jnp.einsum("sikgd,sjkd->skgij", q, k) * config.head_dim**-0.5
    visible = positions[:, None] >= positions
    if runner.layer.window is not None:
        visible &= positions[:, None] - positions < runner.layer.window
    weights_of = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("skgij,sjkd->sikgd", weights_of, v).reshape(num_seqs, length, -1)


@dataclass(frozen=True)
class Projection:
    """A part of a matrix that is a module of its own in checkpoints.

    Attributes:
        module: its name.
        matrix: one of `MATRICES`.
        start, stop: its outputs.
    """

    module: str
    matrix: str
    start: int
    stop: int


@dataclass(frozen=True)
class BlockProblem:
    """One block to be quantized.

    Attributes:
        runner: the block.
        weights: in full precision.
        projections: of its matrices.
        x: [S, L, E], what the quantized blocks before give.
        x_full: the same of the blocks in full precision.
        scale_dtype: in which scales are stored.
    """

    runner: BlockRunner
    weights: dict[str, jax.Array]
    projections: tuple[Projection, ...]
    x: jax.Array
    x_full: jax.Array
    scale_dtype: str

    def of(self, matrix: str) -> tuple[Projection, ...]:
        """The projections of a matrix."""
        return tuple(projection for projection in self.projections if projection.matrix == matrix)

    def part(self, projection: Projection) -> jax.Array:
        """[N, K] of a projection."""
        return self.weights[f"{projection.matrix}.weight"][:, projection.start : projection.stop].T


BlockResult = tuple[dict[str, Made], dict[str, jax.Array]]
"""Module -> matrix, and parameters of the layer that changed besides."""


def with_part(weights: Weights, projection: Projection, values: jax.Array) -> dict[str, jax.Array]:
    """The weights with a projection [N, K] replaced."""
    name = f"{projection.matrix}.weight"
    return {**weights, name: weights[name].at[:, projection.start : projection.stop].set(values.T)}


@jax.jit
def gram_of(inputs: jax.Array) -> jax.Array:
    """[K, K] of inputs [S, L, K]: the mean of x x^T over tokens."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat.T @ flat / flat.shape[0]


def output_error(matrix: jax.Array, values: jax.Array, gram: jax.Array) -> float:
    """Error of a projection's outputs relative to them, as a root mean square; matrices are [N, K]."""
    error = values - matrix

    def size(m: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.maximum(jnp.einsum("ni,ij,nj->", m, gram, m), 0.0))

    return float(size(error) / jnp.maximum(size(matrix), 1e-20))
