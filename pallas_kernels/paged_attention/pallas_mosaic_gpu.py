"""Paged attention for Hopper: what runs around the kernel of `pallas_mosaic_kernel`, and what it can run.

Queries are packed as the plan says, the kernel attends, results are unpacked; the splits of a row are summed meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device import current_device
from pallas_kernels.kv_layout import QUANTIZED, Pages
from pallas_kernels.mosaic import MASKED, SMEM_LIMIT, Hopper, swizzle_of
from pallas_kernels.paged_attention.config import WARPGROUP_ROWS, AttentionConfig, heuristic, resolve, smem_bytes
from pallas_kernels.paged_attention.mosaic_plan import Plan, make_plan
from pallas_kernels.paged_attention.pallas_mosaic_kernel import Kernel
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
    if swizzle_of(problem.head_dim, problem.kv_dtype) is None:
        return f"rows of {problem.head_dim} {problem.kv_dtype} have no swizzled layout in shared memory"
    if problem.kv_dtype in QUANTIZED and problem.head_dim > 128:
        return f"sums of {problem.head_dim} columns leave no registers to widen {problem.kv_dtype} pages"
    for num_tokens in (1, 1 << 20):
        needed = smem_bytes(heuristic(problem, num_tokens), problem)
        if needed > SMEM_LIMIT:
            return f"needs {needed} bytes of shared memory, there are {SMEM_LIMIT}"
    return None


def _combine(partials: jax.Array, lse: jax.Array, plan: Plan, window: int | None, group: int) -> jax.Array:
    """float32[T, K, G, D]: the splits of each row, weighted, one after the other.

    Sums are written out: a reduction's order would be XLA's choice, anew for every shape of a step. Splits that a row
    lacks read its last one again, which lies in the cache.
    """
    if window is None:
        first = jnp.zeros_like(plan.token_first)
    else:  # splits before the window were not written
        first = jnp.maximum(plan.token_first - (window - 1), 0) // (plan.split_blocks * plan.config.kv_block)
    last = jnp.maximum(plan.token_splits - 1, 0)
    heads = jnp.arange(group, dtype=jnp.int32)
    logs, rows = [], []
    for split in range(plan.max_splits):
        there = jnp.clip(split, jnp.minimum(first, last), last)
        rows.append((plan.token_partial + there * plan.token_stride)[:, None] + heads)  # [T, G]
        log = ((plan.token_item + there) * WARPGROUP_ROWS + plan.token_in_tile)[:, None] + heads
        used = (split >= first) & (split <= last)
        logs.append(jnp.where(used[:, None, None], lse[:, log].transpose(1, 0, 2), MASKED))  # [T, K, G]
    top = functools.reduce(jnp.maximum, logs)
    weights = [jnp.exp2(log - top) for log in logs]
    total = functools.reduce(jnp.add, weights)
    acc = jnp.zeros((), jnp.float32)
    for weight, row in zip(weights, rows, strict=True):
        acc = acc + (weight / total)[..., None] * partials[row].transpose(0, 2, 1, 3)
    return acc


@partial(jax.jit, static_argnames=("kernel",))
def _run(q: jax.Array, pages: Pages, plan: Plan, sinks: jax.Array | None, *, kernel: Kernel) -> jax.Array:
    """Pack, attend, unpack. An inner jit: all layers of a step share one trace and one lowered function."""
    num_tokens, heads, dim = q.shape
    kv_heads, group = kernel.problem.num_kv_heads, kernel.group
    head = jnp.arange(kv_heads, dtype=jnp.int32)
    source = (plan.row_token[:, None] * kv_heads + head) * group + plan.row_head[:, None]  # [R, K]
    packed = q.reshape(-1, dim)[source]
    out, *partials = kernel(packed, pages, plan, sinks)
    row = plan.token_row[:, None, None] + jnp.arange(group, dtype=jnp.int32)
    result = out.reshape(-1, dim)[row * kv_heads + head[:, None]]  # [T, K, G, D]
    if partials:
        combined = _combine(partials[0], partials[1], plan, kernel.window, group).astype(q.dtype)
        result = jnp.where((plan.token_splits > 0)[:, None, None, None], combined, result)
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
        splits=plan.max_splits > 1,
        num_ctas=current_device().num_cores,
        ops=Hopper(simulate),
    )
    if simulate:
        kernel = replace(kernel, num_ctas=max(1, SIMULATED_WARPGROUPS // kernel.num_warpgroups))
    return _run(q, pages, plan, sinks, kernel=kernel)


def make(simulate: bool) -> Mapping[str, Callable[..., Any]]:
    """The functions of the implementation, on a GPU or in the simulator."""
    return {"plan": plan, "run": partial(run, simulate=simulate)}
