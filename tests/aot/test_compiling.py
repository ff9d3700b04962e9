"""The judgement itself: a good kernel passes, and each fault that a compiler can see is seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from pallas_kernels import mosaic
from pallas_kernels.aot import SETTINGS, AotUnavailableError, Compiled, compile_for, compile_lowered
from pallas_kernels.device import H200, Device

ROOT = Path(__file__).resolve().parents[2]
MATRIX = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16)


def product(a: jax.Array, b: jax.Array, *, tiles: int = 1, spare: int = 8) -> jax.Array:
    """`a @ b` of one tile, computed `tiles` times, accumulators side by side: more than 2 do not fit in registers.
    `spare` rows of shared memory are not used.
    """

    def body(a_ref: Any, b_ref: Any, o_ref: Any, a_smem: Any, b_smem: Any, o_smem: Any, barrier: Any, _: Any) -> None:
        plgpu.copy_gmem_to_smem(a_ref, a_smem, barrier)
        plgpu.copy_gmem_to_smem(b_ref, b_smem, barrier)
        plgpu.barrier_wait(barrier)
        words = mosaic.Hopper(simulate=False)
        total = words.dot(a_smem, b_smem, (128, 128))
        for _ in range(tiles - 1):
            other = words.dot(a_smem, b_smem, (128, 128))
            total = total * jnp.exp2(other) + jnp.max(total, axis=1, keepdims=True) * other
        o_smem[...] = total.astype(o_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_smem, o_ref)
        plgpu.wait_smem_to_gmem(0)

    tile = plgpu.SMEM((128, 128), jnp.bfloat16, transforms=mosaic.mma_transforms(128, jnp.bfloat16))
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(a.shape, a.dtype),
        scratch_types=[tile, tile, tile, plgpu.Barrier(num_arrivals=2), plgpu.SMEM((spare, 128), jnp.float32)],
        compiler_params=mosaic.compiler_params(),
    )(a, b)


@pytest.fixture(scope="module")
def good() -> Compiled:
    return compile_for(H200, product, MATRIX, MATRIX)


def test_a_good_kernel(good: Compiled) -> None:
    assert good.violations(["HGMMA", "UTMALDG", "UTMASTG"]) == []
    [kernel] = good.kernels
    assert 3 * 128 * 128 * 2 <= kernel.smem_bytes < 3 * 128 * 128 * 2 + 8192
    assert 64 < kernel.registers < 255 and kernel.count("HGMMA") >= 8


def test_memory(good: Compiled) -> None:
    size = 128 * 128 * 2
    assert (good.memory.arguments, good.memory.outputs, good.memory.aliased) == (2 * size, size, 0)


def test_a_missing_instruction(good: Compiled) -> None:
    assert good.violations(["QGMMA"]) == ["no QGMMA instruction"]


def test_donation_shows_as_aliased_bytes() -> None:
    step = jax.jit(lambda x: x.at[0].set(1), donate_argnums=0)
    compiled = compile_lowered(H200, lambda: step.lower(MATRIX))
    assert compiled.memory.aliased == 128 * 128 * 2
    assert compiled.violations() == ["no Mosaic GPU kernel was compiled"]


def test_spills() -> None:
    compiled = compile_for(H200, product, MATRIX, MATRIX, tiles=3)
    [kernel] = compiled.kernels
    assert kernel.spill_store_bytes > 0
    assert any("spills registers" in fault for fault in compiled.violations())


def test_two_kernels_of_a_program_keep_their_own_numbers() -> None:
    def both(a: jax.Array, b: jax.Array) -> jax.Array:
        return product(product(a, b, tiles=2, spare=64), b)

    compiled = compile_for(H200, both, MATRIX, MATRIX)
    few, many = sorted(compiled.kernels, key=lambda kernel: kernel.count("HGMMA"))
    assert 2 * few.count("HGMMA") == many.count("HGMMA")
    spare = (64 - 8) * 128 * 4
    assert spare <= many.smem_bytes - few.smem_bytes < spare + 4096  # buffers are aligned


def test_a_device_without_a_description() -> None:
    with pytest.raises(AotUnavailableError, match="no description of NVIDIA X1 .* nvidia_h200"):
        compile_for(Device("gpu", "NVIDIA X1", (9, 0), 4), product, MATRIX, MATRIX)


def test_a_process_that_was_not_started_for_it() -> None:
    code = (
        "import os\nfor name in ('MOSAIC_GPU_DUMP_PTX', 'MOSAIC_GPU_DUMP_PTXAS'): del os.environ[name]\n"
        "from tests.aot.test_compiling import *\ncompile_for(H200, product, MATRIX, MATRIX)"
    )
    assert set(SETTINGS) > {"MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "1 Mosaic GPU kernels were compiled and 0 reported: start this process with" in result.stderr
