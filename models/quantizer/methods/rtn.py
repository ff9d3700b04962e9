"""Rounding to nearest: no calibration data, no search."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from models.quantizer import grid
from models.quantizer.blocks import BlockProblem, BlockResult
from models.quantizer.types import FP8_BLOCK, FloatMatrix, QuantizedMatrix, Settings


def quantize_block(problem: BlockProblem, settings: Settings) -> BlockResult:
    """Module -> matrix; and no other parameter changes."""
    if settings.format == "fp8":
        return {p.module: quantize_to_floats(problem.part(p)) for p in problem.projections}, {}
    return {p.module: quantize(problem.part(p), settings, problem.scale_dtype) for p in problem.projections}, {}


def quantize(matrix: jax.Array, settings: Settings, scale_dtype: str) -> QuantizedMatrix:
    """One projection [N, K]."""
    groups = grid.grouped(matrix, settings.group_size)
    low, high = grid.range_of(groups)
    scale, zero = grid.choose(low, high, bits=settings.bits, sym=settings.sym, dtype=scale_dtype)
    codes = grid.round_to(groups, scale[..., None], zero[..., None], settings.bits).reshape(matrix.shape)
    return grid.as_matrix(codes, scale, zero, settings.bits, settings.group_size)


def quantize_to_floats(matrix: jax.Array) -> FloatMatrix:
    """One projection [N, K] as 8-bit floats."""
    n, k = matrix.shape
    parts = [matrix[:, start : start + FP8_BLOCK] for start in range(0, k, FP8_BLOCK)]
    scales = [grid.block_scales(part) for part in parts]
    rows = [jnp.repeat(each, FP8_BLOCK)[:n, None] for each in scales]
    numbers = [grid.round_to_float(part, each) for part, each in zip(parts, rows, strict=True)]
    return FloatMatrix(np.asarray(jnp.concatenate(numbers, 1)), np.asarray(jnp.stack(scales, 1)))
