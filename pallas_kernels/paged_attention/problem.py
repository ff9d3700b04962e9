"""`AttentionProblem`: what dispatch, configurations and implementations look at, all static."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionProblem:
    """Static description of one attention call.

    Attributes:
        num_heads, num_kv_heads, head_dim, page_size: H, K, D, P; H is a multiple of K.
        dtype: of queries and output. kv_dtype: of the pages.
        implementation: "auto" or a name (strict).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    kv_dtype: str
    implementation: str = "auto"
