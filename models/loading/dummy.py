"""Seeded random weights, made on the device: for benchmarks and tests that need a model's size and not its sense."""

from __future__ import annotations

import math
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.loading.source import Progress
from models.loading.transfer import total_bytes
from models.parameters import parameter_shapes


def dummy_parameters(
    config: ModelConfig, dtype: np.dtype, seed: int, progress: Progress | None = None
) -> dict[str, jax.Array]:
    """Random parameters that keep activations and logits near unit size, so that softmax and sampling do real work.

    A parameter depends on the seed and its own name only. Norm weights are 1, biases and matrices uniform with the
    standard deviation that keeps the variance of what flows through them; what feeds the residual stream is divided
    by sqrt(2 L), as GPT-2 does (Radford et al. 2019, section 2.3).
    """
    shapes = parameter_shapes(config)
    total, done = total_bytes(shapes, dtype), 0
    key = jax.random.key(seed)
    params: dict[str, jax.Array] = {}
    for name, shape in shapes.items():
        params[name] = _make(name, shape, dtype, key, config.num_layers)
        done += params[name].nbytes
        if progress is not None:
            params[name].block_until_ready()
            progress(done, total, name)
    return jax.block_until_ready(params)


def _make(name: str, shape: tuple[int, ...], dtype: np.dtype, key: jax.Array, num_layers: int) -> jax.Array:
    if name.endswith("norm.weight"):
        return jnp.ones(shape, dtype)
    scale = _scale(name, shape, num_layers)
    # crc32 and not hash(): the same in every process.
    own_key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
    return _uniform(own_key, scale * math.sqrt(3), shape=shape, dtype=dtype)


def _scale(name: str, shape: tuple[int, ...], num_layers: int) -> float:
    """Standard deviation of one parameter."""
    if name in ("embed.weight", "head.weight"):
        return shape[1] ** -0.5  # [V,E]: a normalized hidden state times a row has variance 1
    if name.endswith(".bias"):
        return 0.02
    residual = (2 * num_layers) ** -0.5 if name.endswith(("attn.o.weight", "mlp.down.weight")) else 1.0
    return shape[0] ** -0.5 * residual


# One executable per shape, not one for the whole model: layers share theirs, and compiling takes no longer with depth.
@partial(jax.jit, static_argnames=("shape", "dtype"))
def _uniform(key: jax.Array, bound: float, *, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)
