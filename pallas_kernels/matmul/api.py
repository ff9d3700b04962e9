"""The signature of the dense matrix product, and its dispatch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import native_cpu, reference, xla
from pallas_kernels.matmul.problem import MatmulProblem
from pallas_kernels.op import Implementation, Op


def _everything(problem: MatmulProblem) -> str | None:
    del problem
    return None


OP = Op(
    name="matmul",
    implementations=(
        Implementation(
            "native_cpu", {"run": native_cpu.run}, native_cpu.supports, native_cpu.device_reason, native_cpu.yields
        ),
        Implementation("xla", {"run": xla.run}, _everything),
        Implementation("reference", {"run": reference.run}, _everything),
    ),
    automatic=("native_cpu", "xla"),
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
    problem = MatmulProblem(x.shape[0], x.shape[1], n, str(x.dtype), str(weight.dtype), transposed)
    chosen = OP.choose(implementation, problem)
    return chosen.functions["run"](x, weight, transposed, jnp.dtype(out_dtype or x.dtype))
