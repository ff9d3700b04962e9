"""Tile sizes of the Hopper kernel of the grouped product."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from pallas_kernels.grouped_matmul.problem import GroupedMatmulProblem
from pallas_kernels.quantized_matmul.config import TileConfig, with_stages
from pallas_kernels.quantized_matmul.weight import DENSE

OP_NAME = "grouped_matmul"


def key(problem: GroupedMatmulProblem) -> str:
    """Of a table of tuned configurations; row counts up to the next power of two share one."""
    each = problem.product
    rows = 1 << (each.m - 1).bit_length()
    zero_points = " zp" if each.zero_points else ""
    return (
        f"e{problem.num_experts} m{rows} k{each.k} n{each.n} {each.kind} g{each.group_size}{zero_points} {each.dtype}"
    )


def heuristic(problem: GroupedMatmulProblem) -> TileConfig:
    """A guess: tiles of rows about as large as an expert's share, which is all that a tile can use."""
    each = problem.product
    rows = _rows(problem)
    inputs = 128 if each.k % 128 == 0 else 64
    if each.rule.activations is not None and each.group_size > 0:
        inputs = min(inputs, each.group_size)
    packed = each.kind != DENSE and each.rule.activations is None
    scale_weights = packed and each.in_groups and rows == 128 and each.dtype == "bfloat16"
    if packed and not scale_weights and 0 < each.group_size < inputs:
        rows = min(rows, 64)  # products that are scaled one by one need twice the registers
    return with_stages(TileConfig(rows, 128, inputs, 1, 1, scale_weights), each)


def _rows(problem: GroupedMatmulProblem) -> int:
    share = -(-problem.product.m // problem.num_experts)
    return min(max(8, 1 << (share - 1).bit_length()), 128)


def search_space(problem: GroupedMatmulProblem) -> Iterator[TileConfig]:
    """What the tuner tries."""
    guess = _rows(problem)
    for rows, outputs, inputs, stages in product((8, 16, 32, 64, 128), (128, 256), (64, 128), (2, 3, 4, 6, 8)):
        config = TileConfig(rows, outputs, inputs, stages)
        if (
            guess // 2 <= rows <= guess * 2
            and stages <= problem.product.k // inputs
            and not config.refuses(problem.product)
        ):
            yield config
