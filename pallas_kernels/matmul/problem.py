"""`MatmulProblem`: what the choice of an implementation may depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MatmulProblem:
    """Static description of one product.

    Attributes:
        m, k, n: rows, inputs, outputs.
        dtype: of activations. weight_dtype: of weights.
        transposed: whether weights lie `[N, K]`.
    """

    m: int
    k: int
    n: int
    dtype: str
    weight_dtype: str
    transposed: bool
