"""`WeightFormat`: what the loader asks of a way to make packed weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from models.families.tensors import SourceTensor
from models.layers.product import Matrix, MixedWeight, Weight
from models.loading.source import TensorSource
from models.quantization.schemes import Storage
from pallas_kernels.quantized_matmul import KINDS, QuantizedWeight, StaticActivations


class WeightFormat(Protocol):
    """One way to make packed weights. The loader works projection by projection: it asks `stored` what the checkpoint
    must hold in place of each, reads those, gives them to `pack`, and puts the results side by side (`side_by_side`).
    Host memory stays at one projection, and no projection's scales mix with those it is fused with.
    """

    @property
    def name(self) -> str:
        """For logs and errors: "gptq"."""
        ...

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """What the checkpoint stores in place of a matrix.

        Args:
            parameter: that it becomes a part of, as in `models.parameters`.
            matrix: the plain one, `[out, in]`, under the name `<module>.weight`.
            source: the checkpoint; asked for names, shapes and dtypes only.

        Returns:
            Role ("scales") -> tensor; None if the matrix is stored as it is.

        Raises:
            UnsupportedModelError: it is stored in a way that is not supported; says what is.
        """
        ...

    def pack(self, matrix: SourceTensor, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
        """The matrix on the device.

        Args:
            matrix: as for `stored`.
            tensors: role -> what the checkpoint holds there.
            dtype: of what becomes a dense array `[in, out]`.

        Raises:
            WeightsError: the numbers contradict each other, or cannot be stored.
        """
        ...

    def explains(self, name: str) -> bool:
        """Whether a tensor that no parameter needs belongs to the format, and is no sign of a wrong config."""
        ...


def module_of(matrix: SourceTensor) -> str:
    """Name of the module whose weight a matrix is."""
    return matrix.name.removesuffix(".weight")


def side_by_side(parts: Sequence[Matrix]) -> Weight:
    """Projections of the same inputs as one weight, outputs after outputs: one matrix if they are stored alike."""
    if len(parts) == 1:
        return parts[0]
    arrays = [part for part in parts if isinstance(part, jax.Array)]
    if len(arrays) == len(parts):
        return jnp.concatenate(arrays, axis=-1)
    packed = [part for part in parts if isinstance(part, QuantizedWeight)]
    if len(packed) < len(parts) or not all(_alike(packed[0], part) for part in packed[1:]):
        return MixedWeight(tuple(parts))
    first = packed[0]
    zeros = [part.zero_points for part in packed]
    if any(rows is not None for rows in zeros):
        shapes = [part.scales.shape for part in packed]
        zeros = [jnp.zeros(s, jnp.int8) if rows is None else rows for rows, s in zip(zeros, shapes, strict=True)]
    return replace(
        first,
        stored=jnp.concatenate([part.stored for part in packed], axis=-2),
        scales=jnp.concatenate([part.scales for part in packed], axis=-1),
        zero_points=_joined(zeros),
        offsets=_joined([part.offsets for part in packed]),
        static=_joined_static([part.static for part in packed]),
    )


def _joined(rows: Sequence[jax.Array | None]) -> jax.Array | None:
    """[G, N] of each as one; all of them are there, or none."""
    there = [each for each in rows if each is not None]
    return jnp.concatenate(there, axis=-1) if there else None


def _alike(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Whether two matrices can be one: the same numbers in the same groups, met by the same activations."""
    rule, other_rule = ((m.kind, m.group_size, m.scales.dtype, m.input_limit, m.rotation) for m in (a, b))
    if rule != other_rule:
        return False
    if (a.offsets is None) != (b.offsets is None):
        return False
    left = (a.input_order, a.static and a.static.scale, a.static and a.static.zero_point)
    right = (b.input_order, b.static and b.static.scale, b.static and b.static.zero_point)
    return all(_equal(one, other) for one, other in zip(left, right, strict=True))


def _equal(a: jax.Array | None, b: jax.Array | None) -> bool:
    return a is b if a is None or b is None else bool(jnp.array_equal(a, b))


def _joined_static(parts: Sequence[StaticActivations | None]) -> StaticActivations | None:
    first = parts[0]
    return None if first is None else replace(first, sums=_joined([part and part.sums for part in parts]))


def summary(name: str, params: Mapping[str, Weight]) -> str:
    """One line for logs and people of what is packed: "int4 (w4a16, group 64: qkv, o; w4a16, group 32: down)"."""
    ways: dict[str, list[str]] = {}
    for parameter, weight in params.items():
        for part in weight.parts if isinstance(weight, MixedWeight) else (weight,):
            if isinstance(part, QuantizedWeight):
                group = "a scale per output" if part.group_size < 0 else f"group {part.group_size}"
                turned = f", inputs rotated by {part.rotation}" if part.rotation else ""
                matrices = ways.setdefault(f"{part.kind}, {group}{turned}", [])
                matrix = parameter.split(".")[-2]
                if matrix not in matrices:
                    matrices.append(matrix)
    packed = "; ".join(f"{way}: {', '.join(matrices)}" for way, matrices in ways.items())
    return f"{name} ({packed or 'dequantized'})"


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
        rotation=storage.rotation,
    )


def packed_bytes(shape: tuple[int, ...], storage: Storage) -> int:
    """Bytes on the device of a `[K, N]` parameter, without zero points."""
    stored, scales = packed_shapes(shape, storage)
    return (
        math.prod(stored) * KINDS[storage.kind].bits // 8 + math.prod(scales) * jnp.dtype(storage.scale_dtype).itemsize
    )
