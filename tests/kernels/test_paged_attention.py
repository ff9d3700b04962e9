"""Every implementation of paged attention against the float32 reference, with poison where nothing may be read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_layout import QUANTIZED, Pages, quantize
from pallas_kernels.op import UnsupportedImplementationError
from pallas_kernels.paged_attention import OP, AttentionProblem, paged_attention, plan_attention
from pallas_kernels.paged_attention.cases import CASES, Case
from pallas_kernels.ragged import RaggedBatch

# Tolerances: float32 differs by the order of sums; 16-bit results are rounded once (values are sums of unit normals
# with weights of sum 1).
TOLERANCE = {"float32": 2e-6, "bfloat16": 1.6e-2, "float16": 2e-3}
IMPLEMENTATIONS = [i.name for i in OP.implementations if i.name != "reference"]


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


def run(case: Case, implementation: str, q: jax.Array, pages: Pages, batch: RaggedBatch) -> np.ndarray:
    problem = AttentionProblem(
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype=str(q.dtype),
        kv_dtype=str(pages.data.dtype),
        implementation=implementation,
    )

    @jax.jit
    def call(q: jax.Array, pages: Pages, batch: RaggedBatch) -> jax.Array:
        plan = plan_attention(batch, case.padded_tokens, problem)
        options = {"window": case.window, "soft_cap": case.soft_cap, "sinks": sinks_of(case)}
        return paged_attention(q, pages, plan, problem, scale=case.head_dim**-0.5, **options)

    return np.asarray(call(q, pages, batch), np.float32)


def dense_numpy(case: Case, q: jax.Array, pages: Pages, batch: RaggedBatch) -> np.ndarray:
    """An independent reading of the specification: loops, float64."""
    out = np.zeros(q.shape, np.float64)
    queries, kv, tables = np.asarray(q, np.float64), np.asarray(pages.data, np.float64), np.asarray(batch.block_tables)
    sinks = sinks_of(case)
    row, group = 0, case.num_heads // case.num_kv_heads
    for s, (length, context) in enumerate(zip(case.query_lens, case.context_lens, strict=True)):
        for i in range(length):
            position = context - length + i
            first = 0 if case.window is None else max(0, position - case.window + 1)
            slots = [(tables[s, p // case.page_size], p % case.page_size) for p in range(first, position + 1)]
            keys = np.stack([kv[page, 0, :, offset] for page, offset in slots])
            values = np.stack([kv[page, 1, :, offset] for page, offset in slots])
            for h in range(case.num_heads):
                scores = keys[:, h // group] @ queries[row, h] * case.head_dim**-0.5
                if case.soft_cap is not None:
                    scores = case.soft_cap * np.tanh(scores / case.soft_cap)
                sink = -np.inf if sinks is None else float(sinks[h])
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                out[row, h] = weights / (weights.sum() + np.exp(sink - top)) @ values[:, h // group]
            row += 1
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_reference_against_loops(case: Case) -> None:
    q, pages, batch = make_inputs(case, "float32", seed=1)
    np.testing.assert_allclose(run(case, "reference", q, pages, batch), dense_numpy(case, q, pages, batch), atol=3e-6)


def widened(pages: Pages) -> Pages:
    """The same numbers for a reference in float32."""
    return pages if pages.scales is not None else Pages(pages.data.astype(jnp.float32))


# Every case in the dtypes that most steps run in; the others, which differ in how pages are read, on a few.
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16")]
OTHER_DTYPES = [("float16", "float16"), ("float32", "int8"), *(("bfloat16", d) for d in QUANTIZED)]
FEW = ("decode ragged, padded", "decode window", "mixed", "sinks, window", "page 32")
GRID = [
    *((case, *dtypes) for case in CASES for dtypes in DTYPES),
    *((case, *dtypes) for case in CASES if case.name in FEW for dtypes in OTHER_DTYPES),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "dtype", "kv_dtype"), GRID, ids=lambda x: x.name if isinstance(x, Case) else x)
def test_against_reference(case: Case, implementation: str, dtype: str, kv_dtype: str) -> None:
    q, pages, batch = make_inputs(case, dtype, seed=2, poison=0.0, kv_dtype=kv_dtype)
    expected = run(case, "reference", q.astype(jnp.float32), widened(pages), batch)
    _, poisoned, _ = make_inputs(case, dtype, seed=2, poison=float("nan"), kv_dtype=kv_dtype)
    found = run(case, implementation, q, poisoned, batch)
    live = sum(case.query_lens)
    np.testing.assert_allclose(found[:live], expected[:live], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not found[live:].any(), "padding rows must be 0"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_row_does_not_depend_on_batch_mates(implementation: str) -> None:
    """The same sequence alone and among others gives the same bits."""
    alone = Case("alone", (1,), (300,), num_tokens=16, num_seqs=16, max_blocks=64)
    among = Case("among", (1,) * 9, (300, 5, 17, 900, 64, 1, 33, 310, 299), num_tokens=16, num_seqs=16, max_blocks=64)
    q, pages, batch = make_inputs(among, "float32", seed=3)
    single = RaggedBatch(
        jnp.minimum(batch.query_start, 1), batch.context_lens.at[1:].set(0), batch.block_tables, jnp.int32(1)
    )
    np.testing.assert_array_equal(
        run(among, implementation, q, pages, batch)[0], run(alone, implementation, q, pages, single)[0]
    )


def test_a_wrong_mask_is_seen() -> None:
    """The tolerance is narrow enough: one key too many shows."""
    case = Case("off by one", (1,), (50,), window=24)
    wrong = Case("off by one", (1,), (50,), window=25)
    q, pages, batch = make_inputs(case, "float32", seed=4)
    assert (
        np.abs(run(case, "xla", q, pages, batch) - run(wrong, "xla", q, pages, batch)).max()
        > 100 * TOLERANCE["float32"]
    )


def test_strict_implementation() -> None:
    case = CASES[0]
    q, pages, batch = make_inputs(case, "float32", seed=5)
    with pytest.raises(UnsupportedImplementationError, match="no implementation 'cuda'"):
        run(case, "cuda", q, pages, batch)
    with pytest.raises(UnsupportedImplementationError, match="not a multiple"):
        OP.choose("auto", AttentionProblem(9, 2, 64, 16, "float32", "float32"))
