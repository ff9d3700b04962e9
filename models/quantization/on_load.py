"""Quantization while loading: full-precision matrices, rounded to nearest one projection at a time.

Scales that are chosen among several (8-bit floats) are those with the least squared error. Where a norm makes the
inputs, the squares of its weights say how much an error of each input counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.errors import WeightsError
from models.families.tensors import Assembly, SourceTensor
from models.layers.product import Weight
from models.loading.source import TensorSource
from models.quantization.format import packed_shapes, side_by_side
from models.quantization.schemes import Storage, norm_of, storages_of
from pallas_kernels.device import current_device
from pallas_kernels.quantized_matmul import KINDS, QuantizedWeight, from_dense

_NORM = "norm"  # role of the weights of the norm before a matrix


@dataclass(frozen=True)
class OnLoad:
    """The `WeightFormat` of a full-precision checkpoint.

    Attributes:
        scheme: key of `schemes.SCHEMES`.
        storages: parameter -> how it is stored, of those that are packed (`schemes.storages_of`).
        norms: parameter -> weights of the norm before it, of those that have one.
    """

    scheme: str
    storages: Mapping[str, Storage]
    norms: Mapping[str, SourceTensor]

    @classmethod
    def of(cls, scheme: str, config: ModelConfig, assemblies: Mapping[str, Assembly]) -> OnLoad:
        """The format that a scheme gives a decoder whose parameters are made as `assemblies` say.

        Raises:
            UnsupportedModelError: see `schemes.storages_of`.
        """
        storages = storages_on_device(config, scheme)
        norms = {name: norm_of(name) for name, storage in storages.items() if storage.num_scales > 1}
        return cls(scheme, storages, {name: assemblies[norm].sources[0] for name, norm in norms.items() if norm})

    @property
    def name(self) -> str:
        """See `WeightFormat`."""
        return self.scheme

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """See `WeightFormat`: the matrix itself, and the norm before it where that matters."""
        if parameter not in self.storages:
            return None
        norm = {_NORM: self.norms[parameter]} if parameter in self.norms else {}
        return {parameter: matrix, **norm}

    def pack(self, matrix: SourceTensor, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> QuantizedWeight:
        """See `WeightFormat`: the numbers of the checkpoint are rounded, not their copies in `dtype`."""
        ((parameter, host),) = ((role, host) for role, host in tensors.items() if role != _NORM)
        narrow = host if host.dtype != np.float64 else host.astype(np.float32)
        norm = jnp.asarray(tensors[_NORM].astype(np.float32)) if _NORM in tensors else None
        return _checked(*_round(jax.device_put(narrow), norm, self.storages[parameter]))

    def explains(self, name: str) -> bool:
        """See `WeightFormat`: nothing but the matrices."""
        return False


def storages_on_device(config: ModelConfig, scheme: str) -> dict[str, Storage]:
    """`schemes.storages_of` for the device that is loaded onto."""
    return storages_of(config, scheme, current_device().multiplies_e4m3)


def pack_parameter(matrix: jax.Array, outputs: Sequence[int], storage: Storage, norm: jax.Array | None) -> Weight:
    """A fused parameter `[in, out]` that is on the device already, made of projections with so many outputs each.

    Args:
        matrix: the parameter.
        outputs: of each projection.
        storage: how it is stored.
        norm: weights [in] of the norm before it; None = there is none.

    Raises:
        WeightsError: it holds numbers that are not finite.
    """
    borders = np.cumsum(outputs)[:-1]
    norm = norm if storage.num_scales > 1 else None
    return side_by_side([_checked(*_round(part.T, norm, storage)) for part in jnp.split(matrix, borders, axis=1)])


def _checked(weight: QuantizedWeight, is_finite: jax.Array) -> QuantizedWeight:
    if not bool(is_finite):
        raise WeightsError("a matrix to be quantized holds numbers that are not finite.")
    return weight


@partial(jax.jit, static_argnames="storage")
def _round(matrix: jax.Array, norm: jax.Array | None, storage: Storage) -> tuple[QuantizedWeight, jax.Array]:
    """`[out, in]` and the weights of the norm before it -> packed, and whether all numbers were finite: XLA's maximum
    on a CPU skips NaN.
    """
    weight = from_dense(
        matrix.T,
        storage.kind,
        storage.group_size,
        rows_per_scale=storage.rows_per_scale,
        scale_dtype=jnp.dtype(storage.scale_dtype),
        rotation=storage.rotation,
        num_scales=storage.num_scales,
        importance=None if norm is None else jnp.square(norm.astype(jnp.float32)),
    )
    return weight, jnp.isfinite(matrix).all()


def random_weight(key: jax.Array, deviation: float, shape: tuple[int, ...], storage: Storage) -> QuantizedWeight:
    """Random packed weights of a `[K, N]` parameter, never dense: stored numbers uniform over the kind's range, scales
    within 1.5 of each other.

    Args:
        key: of the random numbers.
        deviation: standard deviation of the values.
        shape: of the parameter.
        storage: how it is stored.
    """
    return _random(key, deviation * math.sqrt(3) / KINDS[storage.kind].largest, shape=shape, storage=storage)


@partial(jax.jit, static_argnames=("shape", "storage"))
def _random(key: jax.Array, scale: float, *, shape: tuple[int, ...], storage: Storage) -> QuantizedWeight:
    rule, (stored_shape, scales_shape) = KINDS[storage.kind], packed_shapes(shape, storage)
    numbers_key, scales_key = jax.random.split(key)
    if rule.dtype.startswith("int"):
        largest = int(rule.largest)
        stored = jax.random.randint(numbers_key, stored_shape, -largest, largest + 1, jnp.int8)
    else:
        # 16 random bits a number are enough for a float of 8.
        stored = jax.random.uniform(numbers_key, stored_shape, jnp.bfloat16, -rule.largest, rule.largest)
    scales = jax.random.uniform(scales_key, scales_shape, jnp.float32, 0.8 * scale, 1.2 * scale)
    return QuantizedWeight(
        stored.astype(rule.dtype),
        scales.astype(storage.scale_dtype),
        None,
        storage.kind,
        storage.group_size,
        rotation=storage.rotation,
    )
