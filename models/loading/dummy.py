"""Seeded random weights, made on the device: for benchmarks and tests that need a model's size and not its sense."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.layers.product import Weight
from models.loading.source import Progress
from models.loading.transfer import total_bytes
from models.parameters import parameter_shapes
from models.quantization.format import packed_bytes
from models.quantization.on_load import random_weight
from models.quantization.schemes import Storage


def dummy_parameters(
    config: ModelConfig,
    dtype: np.dtype,
    seed: int,
    progress: Progress | None = None,
    storages: Mapping[str, Storage] | None = None,
) -> dict[str, Weight]:
    """Random parameters that keep activations and logits near unit size, so that softmax and sampling do real work.

    A parameter depends on the seed and its own name only. Norm weights are 1, biases and matrices uniform with the
    standard deviation that keeps the variance of what flows through them; what feeds the residual stream is divided
    by sqrt(2 L), as GPT-2 does (Radford et al. 2019, section 2.3).

    Args:
        config: the decoder.
        dtype: of what is not packed.
        seed: of the random numbers.
        progress: called after each parameter.
        storages: parameter -> how it is stored, of those that are packed. They are made packed and never were dense.
    """
    shapes, storages = parameter_shapes(config), storages or {}
    sizes = {name: packed_bytes(shapes[name], storage) for name, storage in storages.items()}
    total, done = total_bytes(shapes, dtype, sizes), 0
    key = jax.random.key(seed)
    params: dict[str, Weight] = {}
    for name, shape in shapes.items():
        params[name] = _make(name, shape, dtype, key, config.num_layers, storages.get(name))
        done += total_bytes({name: shape}, dtype, sizes)
        if progress is not None:
            jax.block_until_ready(params[name])
            progress(done, total, name)
    return jax.block_until_ready(params)


def _make(
    name: str, shape: tuple[int, ...], dtype: np.dtype, key: jax.Array, num_layers: int, storage: Storage | None
) -> Weight:
    if name.endswith("norm.weight"):
        return jnp.ones(shape, dtype)
    scale = _scale(name, shape, num_layers)
    # crc32 and not hash(): the same in every process.
    own_key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
    if storage is not None:
        return random_weight(own_key, scale, shape, storage)
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
