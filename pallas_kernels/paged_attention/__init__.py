"""Attention of a ragged batch (decode rows, draft rows and prefill chunks together) over paged keys and values."""

from pallas_kernels.paged_attention.api import OP, AttentionProblem, paged_attention, plan_attention

__all__ = ["OP", "AttentionProblem", "paged_attention", "plan_attention"]
