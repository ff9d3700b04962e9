"""Inputs of the tests of paged attention, with poison where nothing may be read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_layout import QUANTIZED, Pages, quantize
from pallas_kernels.paged_attention import AttentionProblem
from pallas_kernels.paged_attention.cases import Case
from pallas_kernels.ragged import RaggedBatch

# Tolerances: float32 differs by the order of sums; 16-bit results are rounded once (values are sums of unit normals
# with weights of sum 1).
TOLERANCE = {"float32": 2e-6, "bfloat16": 1.6e-2, "float16": 2e-3}


def make_batch(case: Case, tables: np.ndarray) -> RaggedBatch:
    count, total = len(case.query_lens), sum(case.query_lens)
    starts = np.full(case.padded_seqs + 1, total, np.int32)
    starts[: count + 1] = np.concatenate([[0], np.cumsum(case.query_lens)])
    contexts = np.zeros(case.padded_seqs, np.int32)
    contexts[:count] = case.context_lens
    return RaggedBatch(jnp.asarray(starts), jnp.asarray(contexts), jnp.asarray(tables), jnp.int32(count))


def sinks_of(case: Case) -> jax.Array | None:
    """Sinks that matter: as large as the largest scores."""
    return jnp.linspace(-1.0, 4.0, case.num_heads) if case.sinks else None


def as_pages(data: np.ndarray, poisoned: np.ndarray, poison: float, dtype: str) -> Pages:
    """Pages with what no query may see poisoned: the scales, where the stored numbers cannot be (int8 has no NaN)."""
    if dtype not in QUANTIZED:
        return Pages(jnp.asarray(np.where(poisoned[:, None, None, :, None], poison, data), dtype))
    stored, scales = quantize(jnp.asarray(data), dtype)
    return Pages(stored, jnp.where(poisoned[:, None, None, :], poison, scales))


def make_inputs(
    case: Case, dtype: str, seed: int, poison: float = 0.0, kv_dtype: str = ""
) -> tuple[jax.Array, Pages, RaggedBatch]:
    """Random queries and pages; everything that no query may see (null page, tails of last pages, foreign pages) is
    `poison`.
    """
    rng = np.random.default_rng(seed)
    tables, num_pages = case.block_tables(rng)
    size = case.page_size
    pages = rng.standard_normal((num_pages + 3, 2, case.num_kv_heads, size, case.head_dim)).astype(np.float32)
    visible = np.zeros((num_pages + 3, size), bool)
    for row, context in enumerate(case.context_lens):
        for position in range(context):
            visible[tables[row, position // size], position % size] = True
    pages = as_pages(pages, ~visible, poison, kv_dtype or dtype)
    unused = np.ones_like(tables, bool)
    for row, context in enumerate(case.context_lens):
        unused[row, : -(-context // size)] = False
    tables = np.where(unused, num_pages + 1, tables)  # arbitrary entries beyond the context: a poisoned foreign page
    q = rng.standard_normal((case.padded_tokens, case.num_heads, case.head_dim)).astype(np.float32)
    return jnp.asarray(q, dtype), pages, make_batch(case, tables)


def widened(pages: Pages) -> Pages:
    """The same numbers for a reference in float32."""
    return pages if pages.scales is not None else Pages(pages.data.astype(jnp.float32))


def problem_of(case: Case, implementation: str, q: jax.Array, pages: Pages) -> AttentionProblem:
    return AttentionProblem(
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype=str(q.dtype),
        kv_dtype=str(pages.data.dtype),
        implementation=implementation,
    )
