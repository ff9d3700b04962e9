"""The signature of the grouped matrix product, and its dispatch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import pallas_mosaic_gpu, reference, xla
from pallas_kernels.grouped_matmul.gpu_cases import gpu_cases
from pallas_kernels.grouped_matmul.problem import grouped_problem_of
from pallas_kernels.op import Implementation, Op, mosaic_gpu
from pallas_kernels.quantized_matmul import QuantizedWeight


def _everything(problem: object) -> str | None:
    del problem
    return None


OP = Op(
    name="grouped_matmul",
    implementations=(
        *mosaic_gpu(pallas_mosaic_gpu.make, pallas_mosaic_gpu.supports),
        Implementation("xla", {"run": xla.run}, _everything),
        Implementation("reference", {"run": reference.run}, _everything),
    ),
    automatic=("mosaic_gpu", "xla"),
    gpu_cases=gpu_cases,
)


def grouped_matmul(
    x: jax.Array,
    weight: jax.Array | QuantizedWeight,
    group_sizes: jax.Array,
    *,
    out_dtype: Any = None,
    implementation: str = "auto",
) -> jax.Array:
    """`x[t] @ weight[e]` with the expert e of each row, accumulated in float32.

    Args:
        x: [T, K], rows sorted by expert.
        weight: [E, K, N], or packed, with E leading each of its arrays. Packed kinds that quantize activations do so
            as in `quantized_matmul`.
        group_sizes: int32[E], rows of each expert; their sum may be less than T.
        out_dtype: dtype of the result; default x's.
        implementation: "auto" or a name (strict).

    Returns:
        [T, N]; rows after the last expert's are 0.

    Raises:
        ValueError: shapes that do not meet; a weight whose inputs are rotated.
    """
    packed = isinstance(weight, QuantizedWeight)
    shape = (*weight.stored.shape[:-2], weight.k, weight.n) if packed else weight.shape
    if x.ndim != 2 or len(shape) != 3 or x.shape[1] != shape[1] or group_sizes.shape != shape[:1]:
        raise ValueError(f"rows {x.shape} and groups {group_sizes.shape} do not meet a weight of {shape} ([E, K, N])")
    if isinstance(weight, QuantizedWeight) and weight.rotation:
        raise ValueError(f"a weight with inputs turned in blocks of {weight.rotation}: experts have none")
    problem = grouped_problem_of(x, weight, out_dtype)
    chosen = OP.choose(implementation, problem)
    return chosen.functions["run"](x, weight, group_sizes, jnp.dtype(problem.product.out_dtype))
