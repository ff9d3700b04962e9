"""The kernel's workloads as the tuner and ahead-of-time compilation want them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import pallas_mosaic_gpu, xla
from pallas_kernels.grouped_matmul.cases import GPU_CASES, Case
from pallas_kernels.grouped_matmul.config import heuristic, key, search_space
from pallas_kernels.grouped_matmul.problem import grouped_problem_of
from pallas_kernels.op import GpuCase
from pallas_kernels.quantized_matmul import gpu_cases as packed
from pallas_kernels.quantized_matmul.cases import Case as PackedCase
from pallas_kernels.quantized_matmul.weight import DENSE, QuantizedWeight

DTYPE = packed.DTYPE


def arguments_of(case: Case) -> tuple[Any, Any, Any]:
    """Shapes of rows, weights and group sizes."""
    shape, experts = jax.ShapeDtypeStruct, len(case.group_sizes)
    sizes = shape((experts,), jnp.int32)
    if case.kind == DENSE:
        rows = shape((case.num_tokens, case.k), jnp.dtype(DTYPE))
        return rows, shape((experts, case.k, case.n), jnp.dtype(DTYPE)), sizes
    rows, each = packed.arguments_of(_packed_case(case))
    weight = jax.tree.map(lambda leaf: shape((experts, *leaf.shape), leaf.dtype), each)
    return rows, weight, sizes


def _packed_case(case: Case) -> PackedCase:
    return PackedCase(case.name, case.num_tokens, case.k, case.n, case.kind, case.group_size, scale_dtype="bfloat16")


def sample(case: Case, seed: int) -> tuple[jax.Array, jax.Array | QuantizedWeight, jax.Array]:
    """Random rows and weights, and rows that fall to experts at random."""
    experts = len(case.group_sizes)
    sizes = np.random.default_rng(seed).multinomial(sum(case.group_sizes), [1 / experts] * experts)
    if case.kind == DENSE:
        rows, weights = jax.random.split(jax.random.key(seed))
        x, weight, _ = arguments_of(case)
        dense = jax.random.normal(weights, weight.shape, weight.dtype) * case.k**-0.5
        return jax.random.normal(rows, x.shape, x.dtype), dense, jnp.asarray(sizes, jnp.int32)
    x, _ = packed.sample(_packed_case(case), seed)
    each = [packed.sample(_packed_case(case), seed + expert)[1] for expert in range(experts)]
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), jnp.asarray(sizes, jnp.int32)


def gpu_cases() -> tuple[GpuCase, ...]:
    """All of `cases.GPU_CASES`."""
    return tuple(_gpu_case(case) for case in GPU_CASES)


def _gpu_case(case: Case) -> GpuCase:
    x, weight, sizes = arguments_of(case)
    problem = grouped_problem_of(x, weight)
    first = heuristic(problem)

    def function(implementation: str, config: Any) -> Callable[..., Any]:
        run = {"mosaic_gpu": functools.partial(pallas_mosaic_gpu.run, config=config), "xla": xla.run}[implementation]
        return functools.partial(run, out_dtype=jnp.dtype(DTYPE))

    each = weight.size_bytes if isinstance(weight, QuantizedWeight) else weight.size * weight.dtype.itemsize
    live = min(sum(case.group_sizes), len(case.group_sizes))  # experts that are read, at most
    return GpuCase(
        name=case.name,
        key=key(problem),
        arguments=(x, weight, sizes),
        function=function,
        sample=functools.partial(sample, case),
        configs=(first, *(config for config in search_space(problem) if config != first)),
        instructions=(packed.INSTRUCTIONS[problem.product.rule.activations], "UTMALDG"),
        num_bytes=each * live // len(case.group_sizes) + 2 * case.num_tokens * (case.k + case.n),
        num_flops=2 * sum(case.group_sizes) * case.k * case.n,
        in_table=case.k == 2048,
    )
