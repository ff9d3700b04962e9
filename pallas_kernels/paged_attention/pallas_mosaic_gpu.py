"""Paged attention for Hopper: what runs around the kernel of `pallas_mosaic_kernel`, and what it can run.

Queries are packed as the plan says, the kernel attends, a second one adds the splits of contexts, results are unpacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device import current_device
from pallas_kernels.kv_layout import QUANTIZED, Pages
from pallas_kernels.mosaic import SMEM_LIMIT, Hopper
from pallas_kernels.paged_attention.config import AttentionConfig, heuristic, resolve, smem_bytes
from pallas_kernels.paged_attention.mosaic_plan import Plan, make_plan
from pallas_kernels.paged_attention.pallas_mosaic_kernel import Kernel
from pallas_kernels.paged_attention.pallas_mosaic_merge import BLOCKS_PER_CORE, Merge
from pallas_kernels.paged_attention.problem import AttentionProblem
from pallas_kernels.ragged import RaggedBatch

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (16, 32)
SIMULATED_WARPGROUPS = 4  # of all blocks: the simulator's threads share a pool of few, and starve each other


def supports(problem: AttentionProblem) -> str | None:
    """None, or why the kernel cannot run the problem."""
    if problem.num_heads % problem.num_kv_heads:
        return f"{problem.num_heads} query heads are not a multiple of {problem.num_kv_heads} kv heads"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"tensor cores multiply bfloat16 or float16 queries, not {problem.dtype}"
    if problem.kv_dtype != problem.dtype and problem.kv_dtype not in QUANTIZED:
        return f"pages of {problem.kv_dtype} with queries of {problem.dtype}: must be the same, or {QUANTIZED}"
    if problem.head_dim not in HEAD_DIMS:
        return f"head dim {problem.head_dim} is none of {HEAD_DIMS}"
    if problem.page_size not in PAGE_SIZES:
        return f"page size {problem.page_size} is none of {PAGE_SIZES}"
    for num_tokens in (1, 1 << 20):
        needed = smem_bytes(heuristic(problem, num_tokens), problem)
        if needed > SMEM_LIMIT:
            return f"needs {needed} bytes of shared memory, there are {SMEM_LIMIT}"
    return None


def _merge_of(kernel: Kernel) -> Merge:
    """What adds the splits that a kernel made."""
    blocks = 1 if kernel.ops.simulate else BLOCKS_PER_CORE
    return Merge(
        num_kv_heads=kernel.problem.num_kv_heads,
        head_dim=kernel.problem.head_dim,
        dtype=kernel.problem.dtype,
        window=kernel.window,
        kv_block=kernel.config.kv_block,
        num_ctas=kernel.num_ctas * blocks,
        ops=kernel.ops,
    )


@partial(jax.jit, static_argnames=("kernel",))
def _run(q: jax.Array, pages: Pages, plan: Plan, sinks: jax.Array | None, *, kernel: Kernel) -> jax.Array:
    """Pack, attend, unpack. An inner jit: all layers of a step share one trace and one lowered function."""
    num_tokens, heads, dim = q.shape
    kv_heads, group = kernel.problem.num_kv_heads, kernel.group
    head = jnp.arange(kv_heads, dtype=jnp.int32)
    source = (plan.row_token[:, None] * kv_heads + head) * group + plan.row_head[:, None]  # [R, K]
    packed = q.reshape(-1, dim)[source]
    out, *partials = kernel(packed, pages, plan, sinks)
    in_group = jnp.arange(group, dtype=jnp.int32)
    row = plan.token_row[:, None, None] + in_group
    result = out.reshape(-1, dim)[row * kv_heads + head[:, None]]  # [T, K, G, D]
    if partials:
        sums, logs = partials
        merged = _merge_of(kernel)(sums, logs, plan)
        row = jnp.maximum(plan.token_merged, 0)[:, None, None] + in_group
        added = merged.reshape(-1, merged.shape[2])[row + head[:, None] * merged.shape[1], :dim]
        result = jnp.where((plan.token_merged >= 0)[:, None, None, None], added, result)
    result = jnp.where(plan.live[:, None, None, None], result, 0)
    return result.reshape(num_tokens, heads, dim)


def plan(
    batch: RaggedBatch, num_tokens: int, problem: AttentionProblem, *, config: AttentionConfig | None = None
) -> Plan:
    """See `api.plan_attention`.

    Args:
        config: instead of the tuned or heuristic one.
    """
    return make_plan(batch, num_tokens, problem, resolve(problem, num_tokens, current_device(), config))


def run(
    q: jax.Array,
    pages: Pages,
    plan: Plan,
    problem: AttentionProblem,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
    simulate: bool = False,
) -> jax.Array:
    """See `api.paged_attention`.

    Raises:
        ValueError: the scale is not positive (the running maximum is taken before scaling).
    """
    if scale <= 0:
        raise ValueError(f"the scale must be positive, not {scale}")
    kernel = Kernel(
        problem=problem,
        config=plan.config,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        has_sinks=sinks is not None,
        splits=plan.partial_rows > 0,
        num_ctas=current_device().num_cores,
        ops=Hopper(simulate),
    )
    if simulate:
        kernel = replace(kernel, num_ctas=max(1, SIMULATED_WARPGROUPS // kernel.num_warpgroups))
    return _run(q, pages, plan, sinks, kernel=kernel)


def make(simulate: bool) -> Mapping[str, Callable[..., Any]]:
    """The functions of the implementation, on a GPU or in the simulator."""
    return {"plan": plan, "run": partial(run, simulate=simulate)}
