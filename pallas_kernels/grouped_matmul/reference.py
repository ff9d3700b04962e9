"""The specification of the grouped product: every expert on every row, and each row picks its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.reference import met
from pallas_kernels.quantized_matmul.weight import QuantizedWeight, dequantize


def run(x: jax.Array, weight: jax.Array | QuantizedWeight, group_sizes: jax.Array, out_dtype: Any) -> jax.Array:
    """See `api.grouped_matmul`."""
    if isinstance(weight, QuantizedWeight):
        rows, dense = met(x, weight), jnp.swapaxes(dequantize(weight), -1, -2)
    else:
        rows, dense = x.astype(jnp.float32), weight.astype(jnp.float32)
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(x.shape[0])
    out = jnp.zeros((x.shape[0], dense.shape[2]), jnp.float32)
    for expert in range(dense.shape[0]):
        mine = (index >= ends[expert] - group_sizes[expert]) & (index < ends[expert])
        out = out + jnp.where(mine[:, None], jnp.matmul(rows, dense[expert], precision="highest"), 0.0)
    return out.astype(out_dtype)
