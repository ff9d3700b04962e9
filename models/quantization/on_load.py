"""Quantization while loading: full-precision matrices, rounded to nearest one projection at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import WeightsError
from models.families.tensors import SourceTensor
from models.layers.product import Weight
from models.loading.source import TensorSource
from models.quantization.format import packed_shapes, side_by_side
from models.quantization.schemes import Storage
from pallas_kernels.quantized_matmul import KINDS, QuantizedWeight, from_dense


@dataclass(frozen=True)
class OnLoad:
    """The `WeightFormat` of a full-precision checkpoint.

    Attributes:
        scheme: key of `schemes.SCHEMES`.
        storages: parameter -> how it is stored, of those that are packed (`schemes.storages_of`).
    """

    scheme: str
    storages: Mapping[str, Storage]

    @property
    def name(self) -> str:
        """See `WeightFormat`."""
        return self.scheme

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """See `WeightFormat`: the matrix itself."""
        return {parameter: matrix} if parameter in self.storages else None

    def pack(self, matrix: SourceTensor, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> QuantizedWeight:
        """See `WeightFormat`: the numbers of the checkpoint are rounded, not their copies in `dtype`."""
        ((parameter, host),) = tensors.items()
        narrow = host if host.dtype != np.float64 else host.astype(np.float32)
        return _checked(*_round(jax.device_put(narrow), self.storages[parameter]))

    def explains(self, name: str) -> bool:
        """See `WeightFormat`: nothing but the matrices."""
        return False


def pack_parameter(matrix: jax.Array, outputs: Sequence[int], storage: Storage) -> Weight:
    """A fused parameter `[in, out]` that is on the device already, made of projections with so many outputs each.

    Raises:
        WeightsError: it holds numbers that are not finite.
    """
    borders = np.cumsum(outputs)[:-1]
    return side_by_side([_checked(*_round(part.T, storage)) for part in jnp.split(matrix, borders, axis=1)])


def _checked(weight: QuantizedWeight, is_finite: jax.Array) -> QuantizedWeight:
    if not bool(is_finite):
        raise WeightsError("a matrix to be quantized holds numbers that are not finite.")
    return weight


@partial(jax.jit, static_argnames="storage")
def _round(matrix: jax.Array, storage: Storage) -> tuple[QuantizedWeight, jax.Array]:
    """`[out, in]` -> packed, and whether all numbers were finite: XLA's maximum on a CPU skips NaN."""
    weight = from_dense(
        matrix.T,
        storage.kind,
        storage.group_size,
        rows_per_scale=storage.rows_per_scale,
        scale_dtype=jnp.dtype(storage.scale_dtype),
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
        stored.astype(rule.dtype), scales.astype(storage.scale_dtype), None, storage.kind, storage.group_size
    )
