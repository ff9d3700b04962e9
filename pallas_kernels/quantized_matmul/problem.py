"""`QuantizedMatmulProblem`: what the choice of an implementation and of its tiles may depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.weight import DENSE, KINDS, Kind, QuantizedWeight


@dataclass(frozen=True)
class QuantizedMatmulProblem:
    """Static description of one product.

    Attributes:
        m, k, n: rows, inputs, outputs.
        kind: key of `weight.KINDS`; `weight.DENSE` in products of `grouped_matmul`.
        group_size: inputs that share a scale; -1 = all.
        zero_points: whether the weight has them.
        dtype: of activations. out_dtype: of the result. scale_dtype: of the weight's scales.
        offsets: whether the weight has them.
        static_activations: whether activations are quantized by a scale known beforehand.
    """

    m: int
    k: int
    n: int
    kind: str
    group_size: int
    zero_points: bool
    dtype: str
    out_dtype: str
    scale_dtype: str
    offsets: bool = False
    static_activations: bool = False

    @property
    def rule(self) -> Kind:
        """What the kind means."""
        return Kind(self.dtype, 16, 0.0) if self.kind == DENSE else KINDS[self.kind]

    @property
    def in_groups(self) -> bool:
        """Whether products are scaled step by step along K."""
        return self.group_size > 0 or self.zero_points

    @property
    def is_promoted(self) -> bool:
        """Whether products of 8-bit floats with one scale for all K are added in float32 registers step by step: the
        tensor cores' own accumulator keeps about 14 bits of them.
        """
        return self.rule.activations == "float8_e4m3fn" and not self.in_groups


def problem_of(x: jax.Array, weight: QuantizedWeight, out_dtype: Any = None) -> QuantizedMatmulProblem:
    """The description of `x @ weight` with results in `out_dtype`, by default x's."""
    return QuantizedMatmulProblem(
        m=x.shape[0],
        k=weight.k,
        n=weight.n,
        kind=weight.kind,
        group_size=weight.group_size,
        zero_points=weight.zero_points is not None,
        dtype=str(x.dtype),
        out_dtype=str(jnp.dtype(out_dtype or x.dtype)),
        scale_dtype=str(weight.scales.dtype),
        offsets=weight.offsets is not None,
        static_activations=weight.static is not None,
    )
