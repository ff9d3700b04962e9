"""The simulator's harness: a right kernel passes, and each of the usual faults of a kernel fails in its own way."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
import pytest

from pallas_kernels import mosaic
from tests.kernels.simulated import POOL, BodyError, HangError, RaceError, SimulationError, simulated

ROWS = 64


@dataclass(frozen=True)
class Copy:
    """A kernel that adds 1 to a tile, and the fault that is put into it."""

    fault: str = ""


def add_one(x: jax.Array, fault: str) -> jax.Array:
    """`x + 1` for float32[ROWS, 128], by way of shared memory: a load and a store by TMA."""

    def body(x_ref: Any, o_ref: Any, smem: Any, barrier: Any) -> None:
        if fault != "no arrival":
            plgpu.copy_gmem_to_smem(x_ref, smem, barrier)
        if fault != "no wait":
            plgpu.barrier_wait(barrier)
        smem[...] = smem[...] + 1.0
        if fault != "no commit":
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, o_ref)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        compiler_params=mosaic.compiler_params(),
        interpret=mosaic.simulator(),
    )(x)


def numbers() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, 128)).astype(np.float32)


def run_copy(case: Copy) -> jax.Array:
    return add_one(jax.numpy.asarray(numbers()), case.fault)


def run_race_before_a_good_kernel(case: Copy) -> jax.Array:
    return add_one(add_one(jax.numpy.asarray(numbers()), case.fault), "")


def run_no_kernel() -> int:
    return 1


def run_with_deprecated_api() -> None:
    warnings.warn("use something newer", DeprecationWarning, stacklevel=2)


def run_wrong() -> None:
    raise ValueError("the numbers are wrong")


def run_twice(first: int, second: int) -> list[int]:
    return [first, second]


def test_a_right_kernel_passes_and_a_worker_is_used_again() -> None:
    np.testing.assert_array_equal(simulated(run_copy, Copy()), numbers() + 1)
    started = POOL.num_started
    np.testing.assert_array_equal(simulated(run_copy, Copy()), numbers() + 1)
    assert simulated(run_twice, 1, 2, num_kernels=0) == [1, 2]
    assert POOL.num_started == started


@pytest.mark.parametrize("fault", ["no wait", "no commit"])
def test_unordered_accesses_are_a_race(fault: str) -> None:
    with pytest.raises(RaceError, match=f"{fault}(?s:.*)RACE DETECTED"):
        simulated(run_copy, Copy(fault))
    np.testing.assert_array_equal(simulated(run_copy, Copy()), numbers() + 1)


def test_a_race_in_any_kernel_counts() -> None:
    with pytest.raises(RaceError):
        simulated(run_race_before_a_good_kernel, Copy("no commit"), num_kernels=2)


def test_a_wait_without_an_arrival_ends_with_the_place_where_it_waits() -> None:
    with pytest.raises(HangError, match=r"no arrival(?s:.*)did not end in 5 s(?s:.*)wait"):
        simulated(run_copy, Copy("no arrival"), timeout_s=5)
    np.testing.assert_array_equal(simulated(run_copy, Copy()), numbers() + 1)


def test_failures_of_the_body_are_shown() -> None:
    with pytest.raises(BodyError, match=r"run_wrong(?s:.*)the numbers are wrong"):
        simulated(run_wrong, num_kernels=0)
    with pytest.raises(BodyError, match="use something newer"):
        simulated(run_with_deprecated_api, num_kernels=0)


def test_a_body_that_simulates_nothing_proves_nothing() -> None:
    with pytest.raises(SimulationError, match="simulated 0 kernels"):
        simulated(run_no_kernel)
