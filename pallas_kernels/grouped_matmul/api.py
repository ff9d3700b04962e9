"""The signature of the grouped matrix product, and its dispatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import reference, xla
from pallas_kernels.op import Implementation, Op
from pallas_kernels.quantized_matmul import QuantizedWeight


@dataclass(frozen=True)
class GroupedMatmulProblem:
    """Static description.

    Attributes:
        num_tokens, k, n, num_experts: T rows, K inputs, N outputs, E experts.
        dtype: of activations.
        kind: key of `quantized_matmul.KINDS`, or "dense".
    """

    num_tokens: int
    k: int
    n: int
    num_experts: int
    dtype: str
    kind: str


def _everything(problem: GroupedMatmulProblem) -> str | None:
    del problem
    return None


OP = Op(
    name="grouped_matmul",
    implementations=(
        Implementation("xla", {"run": xla.run}, _everything),
        Implementation("reference", {"run": reference.run}, _everything),
    ),
    automatic=("xla",),
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
        ValueError: shapes that do not meet.
    """
    if isinstance(weight, QuantizedWeight):
        shape, kind = (*weight.stored.shape[:-2], weight.k, weight.n), weight.kind
    else:
        shape, kind = weight.shape, "dense"
    if x.ndim != 2 or len(shape) != 3 or x.shape[1] != shape[1] or group_sizes.shape != shape[:1]:
        raise ValueError(f"rows {x.shape} and groups {group_sizes.shape} do not meet a weight of {shape} ([E, K, N])")
    problem = GroupedMatmulProblem(x.shape[0], shape[1], shape[2], shape[0], str(x.dtype), kind)
    chosen = OP.choose(implementation, problem)
    return chosen.functions["run"](x, weight, group_sizes, jnp.dtype(out_dtype or x.dtype))
