"""The workloads that the Mosaic GPU kernel is compiled, timed and tuned for, as `op.GpuCase` wants them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_layout import KVLayout, Pages, quantize
from pallas_kernels.op import GpuCase
from pallas_kernels.paged_attention import pallas_mosaic_gpu, reference, xla
from pallas_kernels.paged_attention.cases import GPU_CASES, Case
from pallas_kernels.paged_attention.config import AttentionConfig, key, search_space
from pallas_kernels.paged_attention.problem import AttentionProblem
from pallas_kernels.ragged import RaggedBatch

DTYPE = "bfloat16"
KV_DTYPES = (DTYPE, "int8", "float8_e4m3fn")
VARIANTS: tuple[Case, ...] = (
    *(
        Case(f"decode, 64 x 1024, head dim {d}", (1,) * 64, (1024,) * 64, 32, 8, head_dim=d, max_blocks=512)
        for d in (64, 80, 96, 256)
    ),
    *(
        Case(f"prefill, 2048, head dim {d}", (2048,), (2048,), 32, 8, head_dim=d, max_blocks=512)
        for d in (64, 80, 96, 256)
    ),
    Case("decode, page 32", (1,) * 64, (1024,) * 64, 32, 8, head_dim=128, page_size=32, max_blocks=512),
    Case("prefill, window, sinks, soft cap", (2048,), (2048,), 64, 8, window=128, sinks=True, soft_cap=50.0),
    Case("decode, window, sinks", (1,) * 64, (1024,) * 64, 64, 8, window=128, sinks=True, max_blocks=512),
    Case("decode, 2 x 131072", (1,) * 2, (131072,) * 2, 32, 8, head_dim=128, max_blocks=8192),
    Case("decode, 71 heads", (1,) * 8, (1024,) * 8, 71, 1, max_blocks=128),
)
IN_TABLE = ("decode, 64 x 8192, Llama-3.1-8B", "prefill, 8192, Llama-3.1-8B", *(case.name for case in VARIANTS))


def _problem(case: Case, kv_dtype: str, implementation: str) -> AttentionProblem:
    return AttentionProblem(
        case.num_heads, case.num_kv_heads, case.head_dim, case.page_size, DTYPE, kv_dtype, implementation
    )


def _layout(case: Case, kv_dtype: str) -> KVLayout:
    pages = 1 + sum(-(-context // case.page_size) for context in case.context_lens)
    return KVLayout(pages, case.num_kv_heads, case.page_size, case.head_dim, kv_dtype)


def _arguments(case: Case, kv_dtype: str) -> tuple[Any, ...]:
    layout = _layout(case, kv_dtype)
    shape: Any = jax.ShapeDtypeStruct
    seqs = case.padded_seqs
    width = case.max_blocks or max(-(-context // case.page_size) for context in case.context_lens)
    int32: Any = partial(shape, dtype=jnp.int32)
    return (
        shape((case.padded_tokens, case.num_heads, case.head_dim), DTYPE),
        Pages(shape(layout.shape, kv_dtype), shape(layout.shape[:4], jnp.float32) if layout.is_quantized else None),
        RaggedBatch(int32((seqs + 1,)), int32((seqs,)), int32((seqs, width)), int32(())),
        *([shape((case.num_heads,), jnp.float32)] if case.sinks else []),
    )


def _sample(case: Case, kv_dtype: str, seed: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    layout = _layout(case, kv_dtype)
    tables, _ = case.block_tables(rng)
    starts = np.full(case.padded_seqs + 1, sum(case.query_lens), np.int32)
    starts[: len(case.query_lens)] = np.cumsum((0, *case.query_lens[:-1]))
    contexts = np.zeros(case.padded_seqs, np.int32)
    contexts[: len(case.context_lens)] = case.context_lens
    batch = RaggedBatch(
        jnp.asarray(starts), jnp.asarray(contexts), jnp.asarray(tables), jnp.int32(len(case.query_lens))
    )
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (case.padded_tokens, case.num_heads, case.head_dim), DTYPE)
    numbers = jax.random.normal(keys[1], layout.shape, DTYPE)
    pages = Pages(*quantize(numbers, kv_dtype)) if layout.is_quantized else Pages(numbers)
    return q, pages, batch, *([jax.random.normal(keys[2], (case.num_heads,))] if case.sinks else [])


def _function(case: Case, kv_dtype: str, name: str, config: AttentionConfig | None) -> Callable[..., jax.Array]:
    """Plan and one layer: what a step pays for its first layer."""
    problem = _problem(case, kv_dtype, name)
    modules: dict[str, Any] = {"mosaic_gpu": pallas_mosaic_gpu, "xla": xla, "reference": reference}
    module = modules[name]
    options = {"config": config} if config is not None else {}

    def call(q: jax.Array, pages: Pages, batch: RaggedBatch, sinks: jax.Array | None = None) -> jax.Array:
        plan = module.plan(batch, case.padded_tokens, problem, **options)
        return module.run(
            q,
            pages,
            plan,
            problem,
            scale=case.head_dim**-0.5,
            window=case.window,
            soft_cap=case.soft_cap,
            sinks=sinks,
        )

    return call


def _work(case: Case, kv_dtype: str) -> tuple[int, int]:
    """Bytes and operations: each sequence's visible keys and values once, queries and results once."""
    keys_read = pairs = 0
    for length, context in zip(case.query_lens, case.context_lens, strict=True):
        first = context - length
        visible = [min(position + 1, case.window or position + 1) for position in range(first, context)]
        pairs += sum(visible)
        keys_read += min(context, length - 1 + (case.window or context))
    layout = _layout(case, kv_dtype)
    num_bytes = keys_read * layout.page_bytes // case.page_size
    num_bytes += 2 * 2 * sum(case.query_lens) * case.num_heads * case.head_dim
    return num_bytes, 4 * pairs * case.num_heads * case.head_dim


def _make(case: Case, kv_dtype: str) -> GpuCase:
    problem = _problem(case, kv_dtype, "mosaic_gpu")
    num_bytes, num_flops = _work(case, kv_dtype)
    return GpuCase(
        name=f"{case.name}, {kv_dtype} pages",
        key=key(problem, case.padded_tokens),
        arguments=_arguments(case, kv_dtype),
        function=partial(_function, case, kv_dtype),
        sample=partial(_sample, case, kv_dtype),
        configs=tuple(search_space(problem, case.padded_tokens)),
        instructions=("HGMMA", "UTMALDG"),
        num_bytes=num_bytes,
        num_flops=num_flops,
        in_table=case.name in IN_TABLE,
    )


def gpu_cases() -> tuple[GpuCase, ...]:
    """All of them that the kernel runs."""
    return tuple(
        _make(case, kv_dtype)
        for case in (*GPU_CASES, *VARIANTS)
        for kv_dtype in KV_DTYPES
        if pallas_mosaic_gpu.supports(_problem(case, kv_dtype, "mosaic_gpu")) is None
    )
