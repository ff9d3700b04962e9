"""Paged attention in C++ (`native/attention.cc`): one call for a whole ragged batch, which reads pages where they lie.

A row's result is the same bits whatever rows are beside it and however its prompt is cut into chunks. Nothing
differentiates it: training attends with XLA's own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.device import Device
from pallas_kernels.kv_layout import QUANTIZED, Pages
from pallas_kernels.paged_attention.problem import AttentionProblem
from pallas_kernels.ragged import RaggedBatch

DTYPES = ("float32", "bfloat16", "float16")


def device_reason(device: Device) -> str | None:
    """None if the device is a CPU, or why not."""
    return None if device.platform == "cpu" else f"needs a CPU, this is {device.platform}"


def supports(problem: AttentionProblem) -> str | None:
    """None, or the reason why it cannot run the problem."""
    if problem.num_heads % problem.num_kv_heads:
        return f"{problem.num_heads} query heads are not a multiple of {problem.num_kv_heads} kv heads"
    if problem.dtype not in DTYPES:
        return f"queries are {problem.dtype}, not float32, bfloat16 or float16"
    if problem.kv_dtype not in (*DTYPES, *QUANTIZED):
        return f"pages are {problem.kv_dtype}, not float32, bfloat16, float16, int8 or float8_e4m3fn"
    return native.unavailable()


def yields(problem: AttentionProblem, device: Device) -> str | None:
    """None, or the reason why "auto" passes it over: XLA is as fast or faster there."""
    del problem, device
    return None if native.has_bfloat16_dots() else "a processor without AVX-512's dots of bfloat16"


def plan(batch: RaggedBatch, num_tokens: int, problem: AttentionProblem) -> RaggedBatch:
    """Nothing to prepare."""
    del num_tokens, problem
    return batch


def run(
    q: jax.Array,
    pages: Pages,
    plan: RaggedBatch,
    problem: AttentionProblem,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """See `api.paged_attention`."""
    del problem
    none = jnp.zeros((0,), jnp.float32)
    call = jax.ffi.ffi_call("quire_paged_attention", jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(
        q,
        pages.data,
        none if pages.scales is None else pages.scales,
        none if sinks is None else sinks.astype(jnp.float32),
        plan.query_start,
        plan.context_lens,
        plan.block_tables,
        plan.num_seqs,
        scale=np.float32(scale),
        cap=np.float32(soft_cap or 0.0),
        window=np.int64(window or 0),
    )
