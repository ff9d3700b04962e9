"""The Hopper kernel of the product with packed weights in the simulator: numbers, races, and tests that can fail."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.device import H200, Device, compiling_for
from pallas_kernels.op import UnsupportedImplementationError
from pallas_kernels.quantized_matmul import KINDS, OP, QuantizedMatmulProblem, QuantizedWeight, reference
from pallas_kernels.quantized_matmul import config as configs
from pallas_kernels.quantized_matmul import pallas_mosaic_gpu as kernel
from pallas_kernels.quantized_matmul.cases import GPU_CASES, Case
from pallas_kernels.quantized_matmul.config import TileConfig
from tests.kernels.simulated import RaceError, SimulationError, simulated

# Of the largest result. Sums are in float32, of exact products; results are rounded once (2^-9 of bfloat16).
TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 3e-6}


@dataclass(frozen=True)
class Simulation:
    """A case with tiles small enough for the simulator.

    Attributes:
        mutation: a fault to put in, see `mutated`.
    """

    case: Case
    tiles: TileConfig
    dtype: str = "bfloat16"
    out_dtype: str = "bfloat16"
    mutation: str = ""


SIMULATIONS: tuple[Simulation, ...] = (
    Simulation(Case("int4 g128", 3, 512, 256, "w4a16", 128, scale_dtype="bfloat16"), TileConfig(8, 128, 128, 2)),
    Simulation(Case("int4 g64, split", 8, 256, 128, "w4a16", 64), TileConfig(8, 128, 64, 2, splits=2)),
    Simulation(
        Case("int4 g32 zp, four groups a step", 9, 256, 128, "w4a16", 32, zero_points=True, scale_dtype="bfloat16"),
        TileConfig(16, 128, 128, 2),
    ),
    Simulation(
        Case("int4 g32 zp, weights scaled", 20, 256, 256, "w4a16", 32, zero_points=True, scale_dtype="bfloat16"),
        TileConfig(16, 256, 128, 2, scale_weights=True),
    ),
    Simulation(
        Case("int8 g128, weights scaled", 8, 256, 128, "w8a16", 128),
        TileConfig(8, 128, 64, 2, scale_weights=True),
        out_dtype="float32",
    ),
    Simulation(Case("int4 g128, long steps", 5, 512, 128, "w4a16", 128), TileConfig(8, 128, 256, 2), dtype="float16"),
    Simulation(Case("int4, per channel, zp", 4, 256, 128, "w4a16", zero_points=True), TileConfig(8, 128, 128, 2)),
    Simulation(Case("int4, per channel", 4, 256, 128, "w4a16"), TileConfig(8, 128, 128, 2), out_dtype="float32"),
    Simulation(Case("int8", 17, 256, 256, "w8a16"), TileConfig(16, 128, 64, 3)),
    Simulation(Case("int8, split", 2, 512, 128, "w8a16"), TileConfig(8, 128, 64, 2, splits=4)),
    Simulation(Case("int8 g128, two steps a group", 8, 256, 128, "w8a16", 128), TileConfig(8, 128, 64, 2)),
    Simulation(Case("int8 g64 zp", 8, 256, 128, "w8a16", 64, zero_points=True), TileConfig(8, 128, 64, 2)),
    Simulation(Case("fp8", 8, 256, 128, "w8a16_fp8"), TileConfig(8, 128, 128, 2), dtype="float16", out_dtype="float16"),
    Simulation(Case("fp8 g128", 70, 256, 128, "w8a16_fp8", 128), TileConfig(32, 128, 128, 2)),
    Simulation(Case("w8a8", 20, 256, 256, "w8a8"), TileConfig(16, 128, 128, 2)),
    Simulation(Case("w8a8, split, float32", 8, 512, 128, "w8a8"), TileConfig(8, 128, 64, 2, 2), out_dtype="float32"),
    Simulation(Case("w8a8 g64", 8, 256, 128, "w8a8", 64), TileConfig(8, 128, 64, 2)),
    Simulation(
        Case("fp8 x fp8, split, float32", 8, 512, 128, "w8a8_fp8"), TileConfig(8, 128, 128, 2, 2), out_dtype="float32"
    ),
    Simulation(Case("fp8 x fp8, wide", 8, 256, 256, "w8a8_fp8"), TileConfig(8, 256, 128, 2)),
    Simulation(
        Case("fp8 x fp8, blocks", 20, 384, 256, "w8a8_fp8", 128, rows_per_scale=128), TileConfig(16, 128, 128, 2)
    ),
)


def mutated(simulation: Simulation, patch: pytest.MonkeyPatch, weight: QuantizedWeight) -> QuantizedWeight:
    """Put the fault in."""
    plgpu = kernel.plgpu
    match simulation.mutation:
        case "":
            pass
        case "no commit":  # the copy to global memory may read shared memory before the threads' writes arrive
            patch.setattr(plgpu, "commit_smem", lambda: None)
        case "buffer not free":  # the next tile's results overwrite shared memory while it is still being copied
            wait = plgpu.wait_smem_to_gmem
            patch.setattr(
                plgpu, "wait_smem_to_gmem", lambda n, wait_read_only=False: None if wait_read_only else wait(n)
            )
        case "scales of a neighbour":
            weight = replace(weight, scales=jnp.roll(weight.scales, 1, axis=0))
        case "no zero points":
            weight = replace(weight, zero_points=jnp.zeros_like(weight.zero_points))
        case _:
            raise ValueError(simulation.mutation)
    return weight


def product(simulation: Simulation) -> tuple[np.ndarray, np.ndarray]:
    """(result in the simulator, result of the reference), both float32."""
    case, rng = simulation.case, np.random.default_rng(0)
    weight, x = case.weight(rng), case.activations(rng, simulation.dtype)
    expected = reference.run(x, weight, jnp.float32)
    with pytest.MonkeyPatch.context() as patch:
        faulty = mutated(simulation, patch, weight)
        found = kernel.run(x, faulty, simulation.out_dtype, simulate=True, config=simulation.tiles)
        found = jax.block_until_ready(found)
    assert found.dtype == simulation.out_dtype
    return np.asarray(found, np.float32), np.asarray(expected)


def error(simulation: Simulation) -> float:
    """Largest difference, of the largest result."""
    found, expected = simulated(product, simulation)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("simulation", SIMULATIONS, ids=lambda s: s.case.name)
def test_simulated(simulation: Simulation) -> None:
    assert simulation.tiles.refuses(problem_of(simulation)) is None
    tolerance = TOLERANCE["bfloat16" if simulation.tiles.scale_weights else simulation.out_dtype]
    assert error(simulation) <= tolerance


def problem_of(simulation: Simulation) -> QuantizedMatmulProblem:
    case = simulation.case
    return QuantizedMatmulProblem(
        case.m,
        case.k,
        case.n,
        case.kind,
        case.group_size,
        case.zero_points,
        simulation.dtype,
        simulation.out_dtype,
        case.scale_dtype,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mutation", ["scales of a neighbour", "no zero points"])
def test_wrong_numbers_are_seen(mutation: str) -> None:
    simulation = next(s for s in SIMULATIONS if s.case.name.startswith("int4 g32 zp"))
    assert error(replace(simulation, mutation=mutation)) > 5 * TOLERANCE["bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", ["no commit", "buffer not free"])
def test_races_are_seen(mutation: str) -> None:
    simulation = Simulation(Case("", 8, 128, 768, "w8a8"), TileConfig(8, 128, 64, 2), mutation=mutation)
    with pytest.raises(RaceError):
        simulated(product, simulation)


def problem(**changes: object) -> QuantizedMatmulProblem:
    base = QuantizedMatmulProblem(8, 4096, 4096, "w4a16", 128, False, "bfloat16", "bfloat16", "bfloat16")
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "activations are float32"),
        ({"out_dtype": "int8"}, "results in int8"),
        ({"n": 192}, "192 outputs are not a multiple of 128"),
        ({"k": 96, "group_size": 32}, "96 inputs are not a multiple of 64"),
        ({"kind": "w8a8", "group_size": 32}, "groups of 32"),
    ],
)
def test_supports_refuses(changes: dict[str, object], message: str) -> None:
    assert kernel.supports(problem()) is None
    assert message in (kernel.supports(problem(**changes)) or "")


@pytest.mark.parametrize(
    ("tiles", "changes", "message"),
    [
        (TileConfig(8, 256, 128, 2), {"n": 4224}, "not a multiple of 256"),
        (TileConfig(8, 128, 128, 2, 8), {"k": 4608}, "x 8 splits"),
        (TileConfig(8, 128, 64, 2, 8), {"k": 512}, "do not align"),
        (TileConfig(8, 128, 128, 2), {"kind": "w8a8", "group_size": 64}, "shorter than a step"),
        (TileConfig(128, 256, 128, 2), {}, "256 registers"),
        (TileConfig(64, 128, 256, 8), {}, "bytes of shared memory"),
        (TileConfig(8, 128, 256, 2), {"kind": "w8a8_fp8", "group_size": -1}, "longer than the 128"),
        (TileConfig(128, 256, 128, 2), {"kind": "w8a8_fp8", "group_size": -1}, "256 registers"),
        (TileConfig(8, 128, 128, 2, scale_weights=True), {"group_size": -1}, "only bfloat16"),
        (TileConfig(8, 128, 128, 2, scale_weights=True), {"dtype": "float16"}, "only bfloat16"),
        (TileConfig(8, 128, 128, 2, scale_weights=True), {"kind": "w8a8_fp8"}, "only bfloat16"),
    ],
)
def test_tiles_refuse(tiles: TileConfig, changes: dict[str, object], message: str) -> None:
    assert message in (tiles.refuses(problem(**changes)) or "")


def test_run_refuses_tiles() -> None:
    case = Case("", 8, 256, 128, "w8a16")
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="not a multiple of 256"):
        kernel.run(case.activations(rng, "bfloat16"), case.weight(rng), "bfloat16", config=TileConfig(8, 256, 64, 2))


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.name)
def test_heuristics_fit(case: Case) -> None:
    """Every real workload has tiles that can run it, among those that the tuner tries if it is not the only one."""
    found = problem_of(Simulation(case, TileConfig(8, 128, 64, 2)))
    assert kernel.supports(found) is None
    guess = configs.heuristic(found, H200)
    assert guess.refuses(found) is None
    assert guess.rows >= min(case.m, 64)
    assert any(guess.rows == other.rows for other in configs.search_space(found))


def test_few_rows_keep_all_cores_busy() -> None:
    guess = configs.heuristic(problem(), H200)
    assert guess.splits == 4  # 32 tiles of outputs on 132 cores
    assert configs.heuristic(problem(m=2048), H200).splits == 1


def test_keys_tell_apart_what_tiles_depend_on() -> None:
    assert configs.key(problem(m=5)) == configs.key(problem(m=8))
    others = [
        {"m": 9},
        {"k": 2048},
        {"n": 2048},
        {"kind": "w8a16"},
        {"group_size": 64},
        {"zero_points": True},
        {"dtype": "float16"},
    ]
    assert len({configs.key(problem(**change)) for change in [{}, *others]}) == 1 + len(others)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_on_hopper(kind: str) -> None:
    """Groups go to the kernel, scales per output to XLA, and so does what the kernel cannot run."""
    with compiling_for(H200):
        assert OP.choose("auto", problem(kind=kind)).name == "mosaic_gpu"
        assert OP.choose("auto", problem(kind=kind, group_size=-1)).name == "xla"
        assert "yields: XLA fuses" in OP.chosen[OP.name]
        assert OP.choose("auto", problem(kind=kind, n=192)).name == "xla"
        assert "refused: 192 outputs" in OP.chosen[OP.name]
        assert OP.choose("mosaic_gpu", problem(kind=kind, group_size=-1)).name == "mosaic_gpu"
    with compiling_for(Device("gpu", "NVIDIA A100-SXM4-80GB", num_cores=108)):
        assert OP.choose("auto", problem(kind=kind)).name == "xla"
        with pytest.raises(UnsupportedImplementationError, match=r"8\.0"):
            OP.choose("mosaic_gpu", problem(kind=kind))


def test_measured_times_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        configs.key(problem()): {"config": {}, "us": 9.0, "xla_us": 7.0},
        configs.key(problem(group_size=-1)): {"config": {}, "us": 5.0, "xla_us": 7.0},
    }
    monkeypatch.setattr(configs, "tuned_entries", lambda op, slug: entries if slug == "nvidia_h200" else {})
    assert configs.prefers_xla(problem(), H200) == "measured 9.0 us, XLA 7.0 us"
    assert configs.prefers_xla(problem(group_size=-1), H200) is None
    assert configs.prefers_xla(problem(m=64), H200) is None


def test_hangs_and_failures_are_told_apart() -> None:
    """A body that raises is no race."""
    with pytest.raises(SimulationError) as raised:
        simulated(product, Simulation(Case("", 8, 128, 128, "w8a8"), TileConfig(8, 256, 64, 2)))
    assert not isinstance(raised.value, RaceError)
