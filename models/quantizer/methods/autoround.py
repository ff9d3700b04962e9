"""AutoRound (Cheng et al. 2023, arXiv 2309.05516): which way each weight is rounded is learned, block by block.

Each weight has an offset V in [-0.5, 0.5] that is added before it is rounded, each group two factors in [0, 1] that cut
its range. Signed gradient descent with a rate that falls to 0 makes the block's outputs those of the block in full
precision; what did best on the way is kept. Rounding passes gradients through.

    code = clip(round(w / scale + V) + zero),   scale and zero of [factor * min, factor * max]

Two steps see different sequences, some of which are harder than others: what did best is what lost least of what
rounding to nearest loses on the same sequences. With `awq_scales` AWQ's scales are folded in first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from models.quantizer import grid
from models.quantizer.blocks import BlockProblem, BlockResult, BlockRunner, Projection, with_part
from models.quantizer.methods import awq
from models.quantizer.types import Made, Settings

Learned = dict[str, dict[str, jax.Array]]  # module -> offsets [N, G, g], factors "low" and "high" [N, G]


def quantize_block(problem: BlockProblem, settings: Settings) -> BlockResult:
    """Module -> matrix; and parameters that took AWQ's scales in, if there are any."""
    target = problem.runner.forward(problem.weights, problem.x_full)
    changed: dict[str, jax.Array] = {}
    if settings.awq_scales:
        problem, changed = awq.folded(problem, settings)
    seed = jax.random.key(settings.seed)
    learned, _ = _descend(
        problem.runner,
        problem.projections,
        settings,
        problem.scale_dtype,
        problem.weights,
        problem.x,
        target,
        seed,
    )
    found: dict[str, Made] = {}
    for projection in problem.projections:
        values = learned[projection.module]
        codes, scale, zero = _codes(problem.part(projection), values, settings, problem.scale_dtype)
        flat = np.asarray(codes).reshape(codes.shape[0], -1)
        found[projection.module] = grid.as_matrix(flat, scale, zero, settings.bits, settings.group_size)
    return found, changed


def _start(matrix: jax.Array, settings: Settings) -> dict[str, jax.Array]:
    groups = grid.grouped(matrix, settings.group_size)
    ones = jnp.ones(groups.shape[:2])
    return {"offset": jnp.zeros_like(groups), "low": ones, "high": ones}


def _codes(
    matrix: jax.Array, learned: dict[str, jax.Array], settings: Settings, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes [N, G, g], scales and zero points [N, G]. Gradients reach all that is learned."""
    groups, most = grid.grouped(matrix, settings.group_size), (1 << settings.bits) - 1
    low, high = grid.range_of(groups)
    low, high = low * jnp.clip(learned["low"], 0.0, 1.0), high * jnp.clip(learned["high"], 0.0, 1.0)
    if settings.sym:
        # The larger end gets the number that reaches further: scales of either sign.
        half = 1 << (settings.bits - 1)
        largest = jnp.where(high > -low, -high, -low)
        exact = jnp.where(jnp.abs(largest) < 1e-8, 1e-8, largest) / half
        zero = jnp.full_like(exact, half)
    else:
        exact = jnp.maximum(high - low, 1e-8) / most
        zero = jnp.clip(_round(-low / exact), 0, most)
    scale = exact + lax.stop_gradient(grid.stored(exact, dtype) - exact)
    numbers = _round(groups / scale[..., None] + jnp.clip(learned["offset"], -0.5, 0.5)) + zero[..., None]
    return jnp.clip(numbers, 0, most), scale, zero


def _round(x: jax.Array) -> jax.Array:
    return x + lax.stop_gradient(jnp.round(x) - x)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _descend(
    runner: BlockRunner,
    projections: tuple[Projection, ...],
    settings: Settings,
    dtype: str,
    weights: dict[str, jax.Array],
    x: jax.Array,
    target: jax.Array,
    seed: jax.Array,
) -> tuple[Learned, jax.Array]:
    """What did best, and its loss over that of rounding to nearest; layers of one shape share what is compiled."""

    def part(projection: Projection) -> jax.Array:
        return weights[f"{projection.matrix}.weight"][:, projection.start : projection.stop].T

    def losses(learned: Learned, samples: jax.Array) -> jax.Array:
        """Of each sample, [S]."""
        made = weights
        for projection in projections:
            matrix = part(projection)
            codes, scale, zero = _codes(matrix, learned[projection.module], settings, dtype)
            values = ((codes - zero[..., None]) * scale[..., None]).reshape(matrix.shape)
            made = with_part(made, projection, values)
        error = runner.forward(made, x[samples]) - target[samples]
        return jnp.mean(error * error, axis=(1, 2))

    def loss(learned: Learned, samples: jax.Array) -> jax.Array:
        return losses(learned, samples).mean()

    rate = optax.linear_schedule(1.0 / settings.steps, 0.0, settings.steps)
    optimizer = optax.sign_sgd(rate)
    learned = {p.module: _start(part(p), settings) for p in projections}
    count = min(settings.batch_size, x.shape[0])
    nearest = lax.map(lambda sample: losses(learned, sample[None])[0], jnp.arange(x.shape[0]))

    def step(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        learned, state, best, best_loss = carry
        samples = jax.random.choice(jax.random.fold_in(seed, index), x.shape[0], (count,), replace=False)
        lost, gradient = jax.value_and_grad(loss)(learned, samples)
        lost = lost / nearest[samples].mean()
        better = lost < best_loss
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), learned, best)
        updates, state = optimizer.update(gradient, state)
        moved = jax.tree.map(lambda value, change: value + change, learned, updates)
        return _bounded(moved), state, best, jnp.minimum(lost, best_loss)

    start = (learned, optimizer.init(learned), learned, jnp.float32(jnp.inf))
    _, _, best, best_loss = lax.fori_loop(0, settings.steps, step, start)
    return best, best_loss


def _bounded(learned: Learned) -> Learned:
    limits = {"offset": (-0.5, 0.5), "low": (0.0, 1.0), "high": (0.0, 1.0)}
    return {
        module: {name: jnp.clip(value, *limits[name]) for name, value in values.items()}
        for module, values in learned.items()
    }
