"""The specification of paged attention: one dense softmax per row, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.kv_layout import Pages, dequantize
from pallas_kernels.ragged import RaggedBatch, token_positions, token_sequences


def plan(batch: RaggedBatch, num_tokens: int, problem: Any) -> RaggedBatch:
    """Nothing to prepare."""
    del num_tokens, problem
    return batch


def run(
    q: jax.Array,
    pages: Pages,
    plan: RaggedBatch,
    problem: Any,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """See `api.paged_attention`. Materialises every row's whole context: for checking, not for use."""
    batch, num_tokens = plan, q.shape[0]
    group = problem.num_heads // problem.num_kv_heads
    sequence = token_sequences(batch, num_tokens)
    position = token_positions(batch, num_tokens)
    tables = batch.block_tables[sequence]  # [T, B]
    kv = dequantize(pages)[tables]  # [T, B, 2, K, P, D]
    kv = jnp.moveaxis(kv, 1, 3)  # [T, 2, K, B, P, D]
    kv = kv.reshape(*kv.shape[:3], -1, problem.head_dim)
    keys, values = (jnp.repeat(kv[:, i], group, axis=1) for i in (0, 1))  # [T, H, C, D]
    scores = jnp.einsum("thd,thcd->thc", q.astype(jnp.float32), keys, precision="highest") * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    key_position = jnp.arange(keys.shape[2])
    visible = key_position <= position[:, None]
    if window is not None:
        visible &= key_position > position[:, None] - window
    visible &= (jnp.arange(num_tokens) < batch.query_start[batch.num_seqs])[:, None]
    scores = jnp.where(visible[:, None, :], scores, -jnp.inf)
    sink = jnp.full((problem.num_heads,), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    top = jnp.maximum(scores.max(-1), sink)  # [T, H]
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.where(visible[:, None, :], jnp.exp(scores - top[..., None]), 0.0)
    total = weights.sum(-1, keepdims=True) + jnp.exp(sink - top)[..., None]
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    values = jnp.where(visible[:, None, :, None], values, 0.0)
    return jnp.einsum("thc,thcd->thd", weights / total, values, precision="highest").astype(q.dtype)
