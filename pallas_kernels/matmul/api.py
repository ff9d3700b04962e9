"""The signature of the dense matrix product, and its dispatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import reference, xla
from pallas_kernels.op import Implementation, Op


@dataclass(frozen=True)
class MatmulProblem:
    """Static description: M rows, K inputs, N outputs, dtype of the operands."""

    m: int
    k: int
    n: int
    dtype: str


def _everything(problem: MatmulProblem) -> str | None:
    del problem
    return None


OP = Op(
    name="matmul",
    implementations=(
        Implementation("xla", {"run": xla.run}, _everything),
        Implementation("reference", {"run": reference.run}, _everything),
    ),
    automatic=("xla",),
)


def matmul(
    x: jax.Array, weight: jax.Array, *, transposed: bool = False, out_dtype: Any = None, implementation: str = "auto"
) -> jax.Array:
    """`x @ weight` with float32 accumulation.

    Args:
        x: [M, K].
        weight: [K, N], or [N, K] if `transposed` (embedding tables used as heads).
        out_dtype: dtype of the result; default x's.
        implementation: "auto" or a name (strict).

    Returns:
        [M, N].
    """
    n = weight.shape[0 if transposed else 1]
    problem = MatmulProblem(x.shape[0], x.shape[1], n, str(x.dtype))
    chosen = OP.choose(implementation, problem)
    return chosen.functions["run"](x, weight, transposed, jnp.dtype(out_dtype or x.dtype))
