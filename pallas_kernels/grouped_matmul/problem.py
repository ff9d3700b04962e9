"""`GroupedMatmulProblem`: what the choice of an implementation and of its tiles may depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.problem import QuantizedMatmulProblem, problem_of
from pallas_kernels.quantized_matmul.weight import DENSE, QuantizedWeight


@dataclass(frozen=True)
class GroupedMatmulProblem:
    """Static description.

    Attributes:
        num_experts: E.
        product: of all T rows, as if one expert had them; its kind is "dense" if the weights are not packed.
    """

    num_experts: int
    product: QuantizedMatmulProblem


def grouped_problem_of(
    x: jax.Array, weight: jax.Array | QuantizedWeight, out_dtype: Any = None
) -> GroupedMatmulProblem:
    """The description of a grouped product with results in `out_dtype`, by default x's."""
    if isinstance(weight, QuantizedWeight):
        return GroupedMatmulProblem(weight.stored.shape[0], problem_of(x, weight, out_dtype))
    experts, k, n = weight.shape
    out = str(jnp.dtype(out_dtype or x.dtype))
    return GroupedMatmulProblem(
        experts, QuantizedMatmulProblem(x.shape[0], k, n, DENSE, -1, False, str(x.dtype), out, "float32")
    )
