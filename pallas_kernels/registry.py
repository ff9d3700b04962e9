"""All ops of the package, and what their ladders chose."""

from __future__ import annotations

from pallas_kernels import grouped_matmul, kv_write, matmul, paged_attention, quantized_matmul, rowwise
from pallas_kernels.op import Op

OPS: tuple[Op, ...] = (paged_attention.OP, kv_write.OP, matmul.OP, quantized_matmul.OP, grouped_matmul.OP, rowwise.OP)


def chosen_implementations() -> dict[str, str]:
    """Op name -> implementation that the last trace chose (and why, where a better one was refused)."""
    return {op.name: op.chosen[op.name] for op in OPS if op.name in op.chosen}
