"""The product of activations with a weight, however the weight is stored: the one place that asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import OP, matmul
from pallas_kernels.op import AUTO
from pallas_kernels.quantized_matmul import QuantizedWeight, quantized_matmul

Matrix = jax.Array | QuantizedWeight
"""A matrix `[in, out]` on the device: an array, or packed."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MixedWeight:
    """Projections of the same inputs that cannot be one matrix, because they are stored in different ways.

    Attributes:
        parts: matrices `[in, out]`, outputs after outputs.
    """

    parts: tuple[Matrix, ...]


Weight = Matrix | MixedWeight
"""What a linear layer holds."""


def product(x: jax.Array, weight: Weight, implementation: str = "auto") -> jax.Array:
    """`x @ weight`, float32 accumulation, in the dtype of `x`.

    Args:
        x: [T, in].
        weight: [in, out].
        implementation: "auto" or a name; dense products, which have fewer, take "auto" for a name that is none of
            theirs.

    Returns:
        [T, out].
    """
    if isinstance(weight, MixedWeight):
        return jnp.concatenate([product(x, part, implementation) for part in weight.parts], axis=-1)
    if isinstance(weight, QuantizedWeight):
        return quantized_matmul(x, weight, implementation=implementation)
    return matmul(x, weight, implementation=_of_dense(implementation))


def product_with_rows(x: jax.Array, table: Weight, out_dtype: Any, implementation: str = "auto") -> jax.Array:
    """`x @ table.T` of a matrix that lies `[out, in]`: an embedding table as the head. Packed ones lie so anyway.

    Args:
        x: [T, in].
        table: [out, in].
        out_dtype: of the result.
        implementation: as in `product`.

    Returns:
        [T, out].
    """
    if isinstance(table, MixedWeight):
        raise TypeError("a head is one matrix")
    if isinstance(table, QuantizedWeight):
        return quantized_matmul(x, table, out_dtype=out_dtype, implementation=implementation)
    return matmul(x, table, transposed=True, out_dtype=out_dtype, implementation=_of_dense(implementation))


def _of_dense(implementation: str) -> str:
    return implementation if implementation in (each.name for each in OP.implementations) else AUTO
