"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after another, and those to come make up for
the error as far as inputs correlate.

    H = mean of x x^T, U = upper Cholesky factor of H^-1
    for each column i:  q_i = round(w_i);  w_j -= (w_i - q_i) / U_ii * U_ij  for all j > i

A group's scale is chosen when its first column is reached, from the weights as they are then. Within a block matrices
follow each other: the inputs of one come from those before it as they are stored.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models.quantizer import grid
from models.quantizer.blocks import MATRICES, BlockProblem, BlockResult, gram_of, with_part
from models.quantizer.types import FP8_BLOCK, FloatMatrix, Made, QuantizedMatrix, Settings

COLUMNS = 128  # rounded between two updates of all that follow


def quantize_block(problem: BlockProblem, settings: Settings) -> BlockResult:
    """Module -> matrix; and no other parameter changes."""
    weights = dict(problem.weights)
    found: dict[str, Made] = {}
    for matrix in MATRICES:
        gram = gram_of(problem.runner.inputs(weights, problem.x)[matrix])
        for projection in problem.of(matrix):
            part = problem.part(projection)
            if settings.format == "fp8":
                quantized: Made = quantize_to_floats(part, gram, settings)
            else:
                quantized = quantize(part, gram, settings, problem.scale_dtype)
            found[projection.module] = quantized
            weights = with_part(weights, projection, jnp.asarray(quantized.values()))
    return found, {}


def quantize(matrix: jax.Array, gram: jax.Array, settings: Settings, scale_dtype: str) -> QuantizedMatrix:
    """One projection [N, K] with inputs of Gram matrix [K, K].

    Columns in order of their weight belong to groups in that order, where the format can say so; otherwise groups lie
    side by side and their scales are chosen beforehand.
    """
    k = matrix.shape[1]
    hessian, matrix = _without_dead(gram, matrix)
    order = np.argsort(-np.diag(hessian), kind="stable") if settings.act_order else np.arange(k)
    size = k if settings.group_size < 0 else settings.group_size
    is_static = settings.act_order and settings.format != "gptq"
    scales = _static(matrix, settings, scale_dtype) if is_static else None
    factor = _factor(hessian[np.ix_(order, order)], settings.damp)
    work, codes, chosen = matrix[:, order], [], []
    step = min(COLUMNS, size)
    for start in range(0, k, step):
        stop = min(start + step, k)
        if scales is not None:
            scale, zero = (rows[:, order[start:stop] // size] for rows in scales)
        else:
            if start % size == 0:
                group = work[:, start : start + size][:, None]
                chosen.append(grid.search(group, None, bits=settings.bits, sym=settings.sym, dtype=scale_dtype))
            scale, zero = (jnp.broadcast_to(rows, (matrix.shape[0], stop - start)) for rows in chosen[-1])
        part, errors = _columns(work[:, start:stop], factor[start:stop, start:stop], scale, zero, bits=settings.bits)
        codes.append(part)
        if stop < k:
            work = work.at[:, stop:].add(-errors @ factor[start:stop, stop:])
    inverse = np.argsort(order)
    found = jnp.concatenate(codes, axis=1)[:, inverse]
    if scales is not None:
        return grid.as_matrix(found, *scales, settings.bits, settings.group_size)
    scale, zero = (jnp.concatenate([each[i] for each in chosen], axis=1) for i in (0, 1))
    group_of = (inverse // size).astype(np.int32) if settings.act_order else None
    return grid.as_matrix(found, scale, zero, settings.bits, settings.group_size, group_of)


def quantize_to_floats(matrix: jax.Array, gram: jax.Array, settings: Settings) -> FloatMatrix:
    """The same as 8-bit floats; a block's scale is chosen when its first column is reached."""
    n, k = matrix.shape
    hessian, work = _without_dead(gram, matrix)
    factor = _factor(hessian, settings.damp)
    numbers, scales = [], []
    for start in range(0, k, FP8_BLOCK):
        stop = min(start + FP8_BLOCK, k)
        scales.append(grid.block_scales(work[:, start:stop]))
        scale = jnp.broadcast_to(jnp.repeat(scales[-1], FP8_BLOCK)[:n, None], (n, stop - start))
        part, errors = _columns(
            work[:, start:stop], factor[start:stop, start:stop], scale, jnp.zeros_like(scale), bits=None
        )
        numbers.append(part)
        if stop < k:
            work = work.at[:, stop:].add(-errors @ factor[start:stop, stop:])
    return FloatMatrix(np.asarray(jnp.concatenate(numbers, axis=1)), np.asarray(jnp.stack(scales, axis=1)))


def _without_dead(gram: jax.Array, matrix: jax.Array) -> tuple[np.ndarray, jax.Array]:
    """float64 Gram matrix and weights, where inputs that were always 0 have no weight and disturb no factor."""
    hessian = np.array(gram, np.float64)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1.0
    return hessian, jnp.where(jnp.asarray(dead), 0.0, matrix)


def _static(matrix: jax.Array, settings: Settings, scale_dtype: str) -> tuple[jax.Array, jax.Array]:
    groups = grid.grouped(matrix, settings.group_size)
    return grid.search(groups, None, bits=settings.bits, sym=settings.sym, dtype=scale_dtype)


def _factor(gram: np.ndarray, damp: float) -> jax.Array:
    """float32[K, K]: the upper Cholesky factor of the damped matrix's inverse. Damped more where it is still not
    positive definite.
    """
    k, mean = len(gram), float(np.mean(np.diag(gram)))
    while True:
        try:
            lower = np.linalg.cholesky(np.linalg.inv(gram + damp * mean * np.eye(k)))
            return jnp.asarray(lower.T, jnp.float32)
        except np.linalg.LinAlgError:
            damp *= 10


@partial(jax.jit, static_argnames="bits")
def _columns(
    part: jax.Array, factor: jax.Array, scale: jax.Array, zero: jax.Array, *, bits: int | None
) -> tuple[jax.Array, jax.Array]:
    """Codes [N, C] of some columns (bits None: numbers of e4m3), and their errors [N, C] over the diagonal of the
    factor.
    """

    def one(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        work, codes, errors = carry
        column = work[:, i]
        if bits is None:
            code = grid.round_to_float(column, scale[:, i])
        else:
            code = grid.round_to(column, scale[:, i], zero[:, i], bits)
        error = (column - (code - zero[:, i]) * scale[:, i]) / factor[i, i]
        # The factor's rows are 0 before the diagonal; the column itself is done with.
        return work - error[:, None] * factor[i], codes.at[:, i].set(code), errors.at[:, i].set(error)

    zeros = jnp.zeros_like(part)
    _, codes, errors = lax.fori_loop(0, part.shape[1], one, (part, zeros, zeros))
    return codes, errors
