"""The grouped product against its reference and against loops."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.device import H200, compiling_for
from pallas_kernels.grouped_matmul import OP, config, grouped_matmul, reference
from pallas_kernels.grouped_matmul import pallas_mosaic_gpu as kernel
from pallas_kernels.grouped_matmul.cases import CASES, GPU_CASES, Case
from pallas_kernels.grouped_matmul.gpu_cases import arguments_of
from pallas_kernels.grouped_matmul.problem import grouped_problem_of
from pallas_kernels.grouped_matmul.tiles import RowTiles, gathered, row_tiles, spread
from pallas_kernels.op import UnsupportedImplementationError
from pallas_kernels.quantized_matmul import QuantizedWeight, from_dense, quantized_matmul
from pallas_kernels.quantized_matmul.config import TileConfig
from tests.kernels.simulated import simulated

TOLERANCE = {"float32": 3e-6, "bfloat16": 4e-3}  # of the largest result, see test_quantized_matmul.py
IMPLEMENTATIONS = [i.name for i in OP.implementations if i.name not in ("reference", "mosaic_gpu_simulated")]
call = jax.jit(grouped_matmul, static_argnames=("out_dtype", "implementation"))


def make_inputs(case: Case, dtype: str) -> tuple[jax.Array, jax.Array | QuantizedWeight, jax.Array]:
    rng = np.random.default_rng(0)
    dense = jnp.asarray(rng.standard_normal((len(case.group_sizes), case.k, case.n)) * case.k**-0.5, dtype)
    weight = dense if case.kind == "dense" else from_dense(dense, case.kind, case.group_size)
    x = jnp.asarray(rng.standard_normal((case.num_tokens, case.k)), dtype)
    return x, weight, jnp.asarray(case.group_sizes, jnp.int32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_reference_against_loops(case: Case) -> None:
    x, weight, sizes = make_inputs(case, "float32")
    found, row = np.asarray(call(x, weight, sizes, implementation="reference")), 0
    for expert, size in enumerate(case.group_sizes):
        own = jax.tree.map(lambda leaf, e=expert: leaf[e], weight)
        for t in range(row, row + size):
            if isinstance(own, QuantizedWeight):
                expected = quantized_matmul(x[t : t + 1], own, implementation="reference")[0]
            else:
                expected = np.asarray(x[t], np.float64) @ np.asarray(own, np.float64)
            np.testing.assert_allclose(found[t], expected, atol=2e-6 * max(1.0, float(np.abs(expected).max())))
        row += size
    assert not found[row:].any(), "rows of no expert must be 0"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_reference(case: Case, implementation: str, dtype: str) -> None:
    x, weight, sizes = make_inputs(case, dtype)
    expected = np.asarray(call(x, weight, sizes, implementation="reference", out_dtype="float32"))
    live = sum(case.group_sizes)
    poisoned = x.at[live:].set(jnp.nan)
    try:
        found = np.asarray(call(poisoned, weight, sizes, implementation=implementation, out_dtype="float32"))
    except UnsupportedImplementationError as refused:
        pytest.skip(str(refused))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype] * max(1.0, np.abs(expected).max()))
    assert call(x, weight, sizes, implementation=implementation).dtype == x.dtype


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_at_the_wrong_expert_is_seen(implementation: str) -> None:
    case = Case("", (3, 4, 1), 64, 32)
    x, weight, sizes = make_inputs(case, "bfloat16")
    right = np.asarray(call(x, weight, sizes, implementation="reference", out_dtype="float32"))
    sizes = jnp.asarray([4, 3, 1])
    try:
        wrong = np.asarray(call(x, weight, sizes, implementation=implementation, out_dtype="float32"))
    except UnsupportedImplementationError as refused:
        pytest.skip(str(refused))
    assert np.abs(right - wrong)[3].max() > 20 * TOLERANCE["bfloat16"] * np.abs(right).max()
    np.testing.assert_allclose(np.delete(wrong, 3, 0), np.delete(right, 3, 0), atol=TOLERANCE["bfloat16"] * 4)


def test_refuses_shapes_that_do_not_meet() -> None:
    with pytest.raises(ValueError, match="do not meet"):
        grouped_matmul(jnp.ones((4, 8)), jnp.ones((2, 16, 3)), jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match="do not meet"):
        grouped_matmul(jnp.ones((4, 16)), jnp.ones((2, 16, 3)), jnp.ones(3, jnp.int32))


def test_case_names_are_unique() -> None:
    names = [case.name for case in (*CASES, *GPU_CASES)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("tile", [1, 4, 8])
@pytest.mark.parametrize(
    "sizes", [(3, 0, 9, 1), (0, 0, 0, 0), (0, 0, 0, 13), (16, 0, 0, 0), (1, 1, 1, 1), (4, 4, 4, 4), (8, 0, 8, 0)]
)
def test_row_tiles(sizes: tuple[int, ...], tile: int) -> None:
    """Each row is in one tile of its expert, at its place, and comes back."""
    num_tokens = 16
    tiles = row_tiles(jnp.asarray(sizes, jnp.int32), num_tokens, tile)
    expert_of_row = np.repeat(np.arange(4), sizes)
    seen = []
    for index in range(int(tiles.count)):
        first, expert = int(tiles.first_rows[index]), int(tiles.experts[index])
        rows = range(first, min(first + tile, int(tiles.ends[expert])))
        assert len(rows) > 0 and (expert_of_row[list(rows)] == expert).all()
        seen += rows
    assert seen == list(range(sum(sizes)))
    rows = jnp.arange(1.0, num_tokens + 1)[:, None]
    expected = np.where(np.arange(num_tokens) < sum(sizes), np.arange(1, num_tokens + 1), 0)
    laid_out = spread(rows, tiles, tile)
    assert laid_out.shape[0] == tiles.experts.shape[0] * tile
    np.testing.assert_array_equal(gathered(laid_out, tiles, tile, num_tokens)[:, 0], expected)


@dataclass(frozen=True)
class Simulation:
    """A case with tiles small enough for the simulator; `shift` sends tiles to another expert, a fault."""

    case: Case
    tiles: TileConfig
    shift: int = 0


SIMULATIONS: tuple[Simulation, ...] = (
    Simulation(Case("dense", (3, 0, 9, 1), 256, 128, padding=2), TileConfig(8, 128, 64, 2)),
    Simulation(Case("dense, split", (0, 10), 256, 128), TileConfig(16, 128, 64, 2, splits=2)),
    Simulation(Case("nothing", (0, 0), 128, 128, padding=3), TileConfig(8, 128, 64, 2)),
    Simulation(Case("int4", (3, 0, 9, 1), 256, 128, "w4a16", 64, padding=2), TileConfig(8, 128, 64, 2)),
    Simulation(Case("int8", (1, 2), 128, 256, "w8a16"), TileConfig(8, 128, 64, 2)),
    Simulation(Case("w8a8", (3, 0, 4, 1), 256, 128, "w8a8"), TileConfig(8, 128, 128, 2)),
    Simulation(
        Case("fp8 x fp8, groups", (1, 0, 0, 10), 256, 256, "w8a8_fp8", 128, padding=2), TileConfig(8, 128, 128, 2)
    ),
)


def product(simulation: Simulation) -> tuple[np.ndarray, np.ndarray]:
    """(result in the simulator, result of the reference), both float32."""
    x, weight, sizes = make_inputs(simulation.case, "bfloat16")
    expected = reference.run(x, weight, sizes, jnp.float32)
    poisoned = x.at[sum(simulation.case.group_sizes) :].set(jnp.nan)

    def faulty(group_sizes: jax.Array, num_tokens: int, tile: int) -> RowTiles:
        right = row_tiles(group_sizes, num_tokens, tile)
        return replace(right, experts=(right.experts + simulation.shift) % group_sizes.shape[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "row_tiles", faulty)
        found = kernel.run(poisoned, weight, sizes, "bfloat16", simulate=True, config=simulation.tiles)
        return np.asarray(found, np.float32), np.asarray(expected)


@pytest.mark.slow
@pytest.mark.parametrize("simulation", SIMULATIONS, ids=lambda s: s.case.name)
def test_simulated(simulation: Simulation) -> None:
    found, expected = simulated(product, simulation)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE["bfloat16"] * max(1.0, np.abs(expected).max()))
    assert not found[sum(simulation.case.group_sizes) :].any()


@pytest.mark.slow
def test_tiles_at_the_wrong_expert_are_seen() -> None:
    found, expected = simulated(product, replace(SIMULATIONS[0], shift=1))
    assert np.abs(found - expected).max() > 20 * TOLERANCE["bfloat16"] * np.abs(expected).max()


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.name)
def test_heuristics_fit(case: Case) -> None:
    problem = grouped_problem_of(*arguments_of(case)[:2])
    assert kernel.supports(problem) is None
    guess = config.heuristic(problem)
    assert guess.refuses(problem.product) is None
    assert any(guess.rows == other.rows for other in config.search_space(problem))
    with compiling_for(H200):
        assert OP.choose("auto", problem).name == "mosaic_gpu"


def test_run_refuses_what_does_not_fit() -> None:
    x, weight, sizes = make_inputs(Case("", (3, 1), 128, 128), "bfloat16")
    with pytest.raises(ValueError, match="not a multiple of 256"):
        kernel.run(x, weight, sizes, "bfloat16", config=TileConfig(8, 256, 64, 2))
    with compiling_for(H200), pytest.raises(UnsupportedImplementationError, match="96 outputs are not a multiple"):
        grouped_matmul(x, weight[:, :, :96], sizes, implementation="mosaic_gpu")
