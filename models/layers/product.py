"""The product of activations with a weight, however the weight is stored: the one place that asks."""

from __future__ import annotations

import jax

from pallas_kernels.matmul import matmul
from pallas_kernels.quantized_matmul import QuantizedWeight, quantized_matmul

Weight = jax.Array | QuantizedWeight
"""A matrix `[in, out]` on the device: an array, or packed."""


def product(x: jax.Array, weight: Weight, implementation: str = "auto") -> jax.Array:
    """`x @ weight`, float32 accumulation, in the dtype of `x`.

    Args:
        x: [T, in].
        weight: [in, out].
        implementation: of products with packed weights; dense ones are always XLA's.

    Returns:
        [T, out].
    """
    if isinstance(weight, QuantizedWeight):
        return quantized_matmul(x, weight, implementation=implementation)
    return matmul(x, weight)
