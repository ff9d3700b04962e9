"""The grouped product on Hopper's tensor cores: the kernel of `quantized_matmul`, with a weight per tile of rows.

Rows are laid out anew such that each tile of them belongs to one expert and starts at a multiple of the tile's size
(`tiles.py`): copies into and out of the tiled shared memory must start at multiples of 8, and an expert's rows may
start anywhere. Rows are few next to weights. How many tiles there are is known on the device only; blocks stop there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from pallas_kernels.device import current_device
from pallas_kernels.grouped_matmul.config import OP_NAME, heuristic, key
from pallas_kernels.grouped_matmul.problem import GroupedMatmulProblem, grouped_problem_of
from pallas_kernels.grouped_matmul.tiles import gathered, row_tiles, spread
from pallas_kernels.mosaic import Hopper
from pallas_kernels.quantized_matmul import pallas_mosaic_gpu as kernel
from pallas_kernels.quantized_matmul.activations import quantize_activations
from pallas_kernels.quantized_matmul.config import TileConfig
from pallas_kernels.quantized_matmul.weight import QuantizedWeight
from pallas_kernels.tuning import choose_config


def supports(problem: GroupedMatmulProblem) -> str | None:
    """None, or the reason why the kernel cannot run the problem."""
    return kernel.supports(problem.product)


def make(simulate: bool) -> dict[str, Any]:
    """The functions of the implementation, see `op.mosaic_gpu`."""
    return {"run": functools.partial(run, simulate=simulate)}


def run(
    x: jax.Array,
    weight: jax.Array | QuantizedWeight,
    group_sizes: jax.Array,
    out_dtype: Any,
    *,
    simulate: bool = False,
    config: TileConfig | None = None,
    num_cores: int | None = None,
) -> jax.Array:
    """See `api.grouped_matmul`.

    Args:
        x, weight, group_sizes, out_dtype: as there.
        simulate: whether to run in JAX's simulator of a GPU.
        config: tiles; default tuned or guessed.
        num_cores: blocks that run at a time; default the device's, 2 in the simulator.

    Raises:
        ValueError: the tiles cannot run this problem.
    """
    problem, device = grouped_problem_of(x, weight, out_dtype), current_device()
    tiles = choose_config(OP_NAME, key(problem), TileConfig, device, config, lambda: heuristic(problem))
    reason = tiles.refuses(problem.product)
    if reason is not None:
        raise ValueError(f"{tiles} cannot run {problem}: {reason}")
    cores = num_cores or (2 if simulate else device.num_cores)
    return _run(x, weight, group_sizes, problem, tiles, cores, simulate)


@functools.partial(jax.jit, static_argnames=("problem", "tiles", "num_cores", "simulate"))
def _run(
    x: jax.Array,
    weight: jax.Array | QuantizedWeight,
    group_sizes: jax.Array,
    problem: GroupedMatmulProblem,
    tiles: TileConfig,
    num_cores: int,
    simulate: bool,
) -> jax.Array:
    """One trace and one lowered function for all layers of the same shape."""
    num_tokens, each = x.shape[0], problem.product
    layout = row_tiles(group_sizes, num_tokens, tiles.rows)
    operands: dict[str, Any]
    if isinstance(weight, QuantizedWeight):
        operands = {"w": weight.stored, "x": x, "s": weight.scales, "z": weight.zero_points}
    else:
        operands = {"w": weight, "x": x}
    if each.rule.activations is not None:
        operands["x"], scales = quantize_activations(x, each.rule.activations, each.group_size)
        operands["t"] = spread(scales, layout, tiles.rows).T
    operands["x"] = spread(operands["x"], layout, tiles.rows)
    operands |= {"e": layout.experts, "c": layout.count[None]}
    rows, dtype = operands["x"].shape[0], str(operands["x"].dtype)
    plan = kernel.Plan(each, tiles, rows, dtype, num_cores, Hopper(simulate), experts=True)
    out = kernel.launch(plan, {name: array for name, array in operands.items() if array is not None})
    out = out[0] if tiles.splits == 1 else out.sum(0)
    return gathered(out, layout, tiles.rows, num_tokens).astype(each.out_dtype)
