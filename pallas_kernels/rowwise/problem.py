"""What the choice of an implementation may depend on, and how a projection's heads lie."""

from __future__ import annotations

from dataclasses import dataclass

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@dataclass(frozen=True)
class RowwiseProblem:
    """Static description of one call.

    Attributes:
        function: "norm", "gate", "heads" or "turns".
        dtype: of the rows.
        activation: of a gate; None elsewhere.
    """

    function: str
    dtype: str
    activation: str | None = None


@dataclass(frozen=True)
class Heads:
    """The columns of a fused projection: `num_q` heads of queries, `num_kv` of keys, `num_kv` of values, `dim` each."""

    num_q: int
    num_kv: int
    dim: int
