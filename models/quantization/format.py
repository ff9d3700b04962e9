"""`WeightFormat`: what the loader asks of a way to make packed weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.families.tensors import SourceTensor
from models.quantization.schemes import Storage
from pallas_kernels.quantized_matmul import KINDS, QuantizedWeight


class WeightFormat(Protocol):
    """One way to make packed weights. The loader works projection by projection: it asks `tensors` what the checkpoint
    must hold in place of each, reads those, gives them to `pack`, and puts the results side by side (`side_by_side`).
    Host memory stays at one projection, and no projection's scales mix with those it is fused with.
    """

    def storages(self, config: ModelConfig) -> Mapping[str, Storage]:
        """Parameter -> how it will lie on the device, of those that are packed; all others are loaded as they are.

        Raises:
            UnsupportedModelError: the model cannot be stored like this; says what can.
        """
        ...

    def tensors(self, matrix: SourceTensor) -> tuple[SourceTensor, ...]:
        """Names and shapes of what the checkpoint stores in place of a packed projection `[out, in]`."""
        ...

    def pack(self, tensors: Sequence[np.ndarray], storage: Storage) -> QuantizedWeight:
        """The projection on the device, from what `tensors` named, in that order.

        Raises:
            WeightsError: the numbers cannot be stored like this.
        """
        ...


def side_by_side(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Projections of the same inputs as one fused matrix, outputs after outputs."""
    first = parts[0]
    if len(parts) == 1:
        return first
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return QuantizedWeight(
        jnp.concatenate([part.stored for part in parts], axis=-2),
        jnp.concatenate([part.scales for part in parts], axis=-1),
        jnp.concatenate(zeros, axis=-1) if zeros else None,
        first.kind,
        first.group_size,
    )


def packed_shapes(shape: tuple[int, ...], storage: Storage) -> tuple[tuple[int, int], tuple[int, int]]:
    """`[N, K]` of the stored numbers and `[G, N]` of the scales of a `[K, N]` parameter."""
    k, n = shape
    return (n, k), (1 if storage.group_size < 0 else k // storage.group_size, n)


def packed_struct(shape: tuple[int, ...], storage: Storage) -> QuantizedWeight:
    """A `[K, N]` parameter as `jax.ShapeDtypeStruct`s, to trace with."""
    stored, scales = packed_shapes(shape, storage)
    return QuantizedWeight(
        jax.ShapeDtypeStruct(stored, jnp.dtype(KINDS[storage.kind].dtype)),  # type: ignore[arg-type]
        jax.ShapeDtypeStruct(scales, jnp.dtype(storage.scale_dtype)),  # type: ignore[arg-type]
        None,
        storage.kind,
        storage.group_size,
    )


def packed_bytes(shape: tuple[int, ...], storage: Storage) -> int:
    """Bytes on the device of a `[K, N]` parameter, without zero points."""
    stored, scales = packed_shapes(shape, storage)
    return (
        math.prod(stored) * KINDS[storage.kind].bits // 8 + math.prod(scales) * jnp.dtype(storage.scale_dtype).itemsize
    )
