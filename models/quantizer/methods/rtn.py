"""Rounding to nearest: no calibration data, no search."""

from __future__ import annotations

import jax

from models.quantizer import grid
from models.quantizer.blocks import BlockProblem
from models.quantizer.types import QuantizedMatrix, Settings


def quantize_block(
    problem: BlockProblem, settings: Settings
) -> tuple[dict[str, QuantizedMatrix], dict[str, jax.Array]]:
    """Module -> matrix; and no other parameter changes."""
    return {p.module: quantize(problem.part(p), settings, problem.scale_dtype) for p in problem.projections}, {}


def quantize(matrix: jax.Array, settings: Settings, scale_dtype: str) -> QuantizedMatrix:
    """One projection [N, K]."""
    groups = grid.grouped(matrix, settings.group_size)
    low, high = grid.range_of(groups)
    scale, zero = grid.choose(low, high, bits=settings.bits, sym=settings.sym, dtype=scale_dtype)
    codes = grid.round_to(groups, scale[..., None], zero[..., None], settings.bits).reshape(matrix.shape)
    return grid.as_matrix(codes, scale, zero, settings.bits, settings.group_size)
