"""AWQ (Lin et al. 2023, arXiv 2306.00978): inputs with large activations get finer weights.

Columns of a matrix are multiplied by a scale for each input, and what makes the inputs is divided by it: the norm
before, or the rows of the projection before. The scale is a power of the mean magnitude of each input; the exponent
that loses least is searched for, and then how far each group's range is cut.

    s = mean |x| ^ a,   a = 0, 1/20, …;   W' = W * s,   x' = x / s
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.quantizer import grid
from models.quantizer.blocks import BlockProblem, BlockResult, gram_of
from models.quantizer.types import Made, Settings

EXPONENTS = tuple(float(a) for a in np.arange(20) / 20)
_ROTATED = ("q_proj", "k_proj")  # whose ranges are not cut: attention is sensitive to them


def quantize_block(problem: BlockProblem, settings: Settings) -> BlockResult:
    """Module -> matrix, and parameters that took the scales in."""
    problem, changed = folded(problem, settings)
    inputs = problem.runner.inputs(problem.weights, problem.x)
    found: dict[str, Made] = {}
    for projection in problem.projections:
        part = problem.part(projection)
        is_rotated = projection.module.endswith(_ROTATED)
        gram = None if is_rotated else _blocks_of(inputs[projection.matrix], settings.group_size)
        groups = grid.grouped(part, settings.group_size)
        if gram is None:
            low, high = grid.range_of(groups)
            scale, zero = grid.choose(low, high, bits=settings.bits, sym=settings.sym, dtype=problem.scale_dtype)
        else:
            scale, zero = grid.search(groups, gram, bits=settings.bits, sym=settings.sym, dtype=problem.scale_dtype)
        codes = grid.round_to(groups, scale[..., None], zero[..., None], settings.bits).reshape(part.shape)
        found[projection.module] = grid.as_matrix(codes, scale, zero, settings.bits, settings.group_size)
    return found, changed


_MATRIX_ENDINGS = ("qkv.weight", "attn.o.weight", "gate_up.weight", "down.weight")


def folded(problem: BlockProblem, settings: Settings) -> tuple[BlockProblem, dict[str, jax.Array]]:
    """The block with scales folded in, and which of its parameters changed besides the matrices."""
    weights = fold(problem, settings)
    others = {name: value for name, value in weights.items() if not name.endswith(_MATRIX_ENDINGS)}
    changed = {name: value for name, value in others.items() if value is not problem.weights[name]}
    return replace(problem, weights=weights), changed


def fold(problem: BlockProblem, settings: Settings) -> dict[str, jax.Array]:
    """The block's weights with scales folded in: the same function."""
    config, weights = problem.runner.config, dict(problem.weights)
    inputs = problem.runner.inputs(weights, problem.x)

    def best(matrix: str) -> jax.Array:
        return _best_scale(weights[f"{matrix}.weight"].T, inputs[matrix], settings, problem.scale_dtype)

    for norm, matrix in (("attn_norm.weight", "attn.qkv"), ("mlp_norm.weight", "mlp.gate_up")):
        scale = best(matrix)
        weights[norm] = weights[norm] / scale
        weights[f"{matrix}.weight"] = weights[f"{matrix}.weight"] * scale[:, None]
    if config.num_heads == config.num_kv_heads:  # otherwise several heads share an output of v
        _into_outputs(weights, "attn.qkv", config.q_size + config.kv_size, "attn.o", best("attn.o"))
    _into_outputs(weights, "mlp.gate_up", config.intermediate_size, "mlp.down", best("mlp.down"))
    return weights


def _into_outputs(weights: dict[str, jax.Array], before: str, start: int, matrix: str, scale: jax.Array) -> None:
    """Divide outputs from `start` on of the matrix before, bias included, and multiply what meets them."""
    outputs = slice(start, start + len(scale))
    for name in (f"{before}.weight", f"{before}.bias"):
        if name in weights:
            weights[name] = weights[name].at[..., outputs].divide(scale)
    weights[f"{matrix}.weight"] = weights[f"{matrix}.weight"] * scale[:, None]


def _best_scale(matrix: jax.Array, inputs: jax.Array, settings: Settings, scale_dtype: str) -> jax.Array:
    """float32[K] for a matrix [N, K]; ones if no exponent is better than none."""
    gram, size = gram_of(inputs), jnp.abs(inputs).mean((0, 1))
    best, chosen = np.inf, jnp.ones_like(size)
    for exponent in EXPONENTS:
        scale = jnp.maximum(size, 1e-4) ** exponent
        scale = scale / jnp.sqrt(scale.max() * scale.min())
        lost = float(_loss(matrix, gram, scale, settings.bits, settings.group_size, settings.sym, scale_dtype))
        if lost < best:
            best, chosen = lost, scale
    return chosen


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _loss(
    matrix: jax.Array, gram: jax.Array, scale: jax.Array, bits: int, group_size: int, sym: bool, dtype: str
) -> jax.Array:
    """Squared error of outputs if the matrix is scaled, rounded and scaled back."""
    groups = grid.grouped(matrix * scale, group_size)
    low, high = grid.range_of(groups)
    step, zero = grid.choose(low, high, bits=bits, sym=sym, dtype=dtype)
    rounded = (grid.round_to(groups, step[..., None], zero[..., None], bits) - zero[..., None]) * step[..., None]
    error = rounded.reshape(matrix.shape) / scale - matrix
    return jnp.einsum("ni,ij,nj->", error, gram, error)


def _blocks_of(inputs: jax.Array, group_size: int) -> jax.Array:
    """[G, g, g]: Gram matrices of each group's inputs."""
    k = inputs.shape[-1]
    size = k if group_size < 0 else group_size
    flat = inputs.reshape(-1, k // size, size)
    return jnp.einsum("tgi,tgj->gij", flat, flat) / flat.shape[0]
