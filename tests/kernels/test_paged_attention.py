"""Every implementation of paged attention against the float32 reference, with poison where nothing may be read."""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.kv_layout import QUANTIZED, Pages
from pallas_kernels.op import UnsupportedImplementationError
from pallas_kernels.paged_attention import OP, AttentionProblem, paged_attention, plan_attention
from pallas_kernels.paged_attention.cases import CASES, Case
from pallas_kernels.ragged import RaggedBatch
from tests.kernels.attention_inputs import TOLERANCE, make_inputs, problem_of, sinks_of, widened

# The Mosaic GPU kernel has a file of its own: its simulator wants smaller cases.
NAMES = [i.name for i in OP.implementations if not i.name.startswith(("reference", "mosaic_gpu"))]
NO_COMPILER = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
IMPLEMENTATIONS = [pytest.param(name, marks=NO_COMPILER if name == "native_cpu" else ()) for name in NAMES]


def run(case: Case, implementation: str, q: jax.Array, pages: Pages, batch: RaggedBatch) -> np.ndarray:
    problem = problem_of(case, implementation, q, pages)

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


# Every case in the dtypes that most steps run in; the others, which differ in how pages are read, on a few.
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16")]
OTHER_DTYPES = [("float16", "float16"), ("float32", "int8"), *(("bfloat16", d) for d in QUANTIZED)]
FEW = ("decode ragged, padded", "decode window", "mixed", "sinks, window", "page 32")
GRID = [
    *((case, *dtypes) for case in CASES for dtypes in DTYPES),
    *((case, *dtypes) for case in CASES if case.name in FEW for dtypes in OTHER_DTYPES),
]


@lru_cache(maxsize=1)  # implementations take turns at each case
def expected_of(case: Case, dtype: str, kv_dtype: str) -> np.ndarray:
    q, pages, batch = make_inputs(case, dtype, seed=2, poison=0.0, kv_dtype=kv_dtype)
    return run(case, "reference", q.astype(jnp.float32), widened(pages), batch)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "dtype", "kv_dtype"), GRID, ids=lambda x: x.name if isinstance(x, Case) else x)
def test_against_reference(case: Case, implementation: str, dtype: str, kv_dtype: str) -> None:
    expected = expected_of(case, dtype, kv_dtype)
    q, poisoned, batch = make_inputs(case, dtype, seed=2, poison=float("nan"), kv_dtype=kv_dtype)
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
