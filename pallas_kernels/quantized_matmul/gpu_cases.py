"""The kernel's workloads as the tuner and ahead-of-time compilation want them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device import H200
from pallas_kernels.op import GpuCase
from pallas_kernels.quantized_matmul import pallas_mosaic_gpu, xla
from pallas_kernels.quantized_matmul.cases import GPU_CASES, Case
from pallas_kernels.quantized_matmul.config import heuristic, key, search_space
from pallas_kernels.quantized_matmul.problem import problem_of
from pallas_kernels.quantized_matmul.weight import KINDS, QuantizedWeight

DTYPE = "bfloat16"
INSTRUCTIONS = {None: "HGMMA", "int8": "IGMMA", "float8_e4m3fn": "QGMMA"}  # by the dtype of activations
_TABLE_ROWS = (8, 64, 2048)


def arguments_of(case: Case) -> tuple[jax.ShapeDtypeStruct, QuantizedWeight]:
    """Shapes of activations and weight."""
    scales = (1 if case.group_size < 0 else case.k // case.group_size, case.n)
    shape = jax.ShapeDtypeStruct
    weight = QuantizedWeight(
        stored=shape((case.n, case.k), jnp.dtype(KINDS[case.kind].dtype)),  # type: ignore[arg-type]
        scales=shape(scales, jnp.dtype(case.scale_dtype)),  # type: ignore[arg-type]
        zero_points=shape(scales, jnp.int8) if case.zero_points else None,  # type: ignore[arg-type]
        kind=case.kind,
        group_size=case.group_size,
    )
    return shape((case.m, case.k), jnp.dtype(DTYPE)), weight


def sample(case: Case, seed: int) -> tuple[jax.Array, QuantizedWeight]:
    """Random activations and numbers of a weight, all of its range in use."""
    x, weight = arguments_of(case)
    keys = jax.random.split(jax.random.key(seed), 4)
    kind = KINDS[case.kind]
    if kind.dtype == "float8_e4m3fn":
        stored = (jax.random.normal(keys[0], weight.stored.shape, jnp.bfloat16) * 64).astype(kind.dtype)
    else:
        bound = 2 ** (kind.bits - 1)
        stored = jax.random.randint(keys[0], weight.stored.shape, -bound, bound, jnp.int8).astype(kind.dtype)
    scales = jax.random.uniform(keys[1], weight.scales.shape, jnp.float32, 0.5, 2.0) / kind.largest * case.k**-0.5
    zeros = weight.zero_points
    if zeros is not None:
        zeros = jax.random.randint(keys[2], zeros.shape, -4, 4, jnp.int8)
    packed = QuantizedWeight(stored, scales.astype(weight.scales.dtype), zeros, case.kind, case.group_size)
    return jax.random.normal(keys[3], x.shape, x.dtype), packed


def gpu_cases() -> tuple[GpuCase, ...]:
    """All of `cases.GPU_CASES` that the kernel supports."""
    return tuple(_gpu_case(case) for case in GPU_CASES)


def _gpu_case(case: Case) -> GpuCase:
    x, weight = arguments_of(case)
    problem = problem_of(x, weight)  # type: ignore[arg-type]
    first = heuristic(problem, H200)

    def function(implementation: str, config: Any) -> Callable[..., Any]:
        run = {"mosaic_gpu": functools.partial(pallas_mosaic_gpu.run, config=config), "xla": xla.run}[implementation]
        return functools.partial(run, out_dtype=jnp.dtype(DTYPE))

    return GpuCase(
        name=case.name,
        key=key(problem),
        arguments=(x, weight),
        function=function,
        sample=functools.partial(sample, case),
        configs=(first, *(config for config in search_space(problem) if config != first)),
        instructions=(INSTRUCTIONS[KINDS[case.kind].activations], "UTMALDG"),
        num_bytes=weight.size_bytes + 2 * case.m * (case.k + case.n),
        num_flops=2 * case.m * case.k * case.n,
        in_table=case.name.startswith("Llama-3.1-8B 4096x4096") and case.m in _TABLE_ROWS,
    )
