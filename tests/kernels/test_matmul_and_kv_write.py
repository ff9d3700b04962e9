"""The matrix product and the KV write against their references."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import kv_write as kv
from pallas_kernels import matmul as mm
from pallas_kernels import native
from pallas_kernels.kv_layout import NULL_PAGE, QUANTIZED, KVLayout, Pages, dequantize, quantize, rows_view
from pallas_kernels.kv_write.cases import CASES as KV_CASES
from pallas_kernels.kv_write.cases import Case as KVCase
from pallas_kernels.matmul.cases import CASES as MATMUL_CASES
from pallas_kernels.matmul.cases import Case as MatmulCase
from pallas_kernels.op import UnsupportedImplementationError
from pallas_kernels.ragged import RaggedBatch

RELATIVE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("implementation", [i.name for i in mm.OP.implementations if i.name != "reference"])
@pytest.mark.parametrize("case", MATMUL_CASES, ids=lambda c: c.name)
def test_matmul(case: MatmulCase, implementation: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((case.m, case.k)), dtype)
    w = jnp.asarray(rng.standard_normal((case.n, case.k) if case.transposed else (case.k, case.n)), dtype)
    call = jax.jit(mm.matmul, static_argnames=("transposed", "implementation", "out_dtype"))
    try:
        found = call(x, w, transposed=case.transposed, implementation=implementation, out_dtype="float32")
    except UnsupportedImplementationError as refused:
        pytest.skip(str(refused))
    expected = call(x, w, transposed=case.transposed, implementation="reference", out_dtype="float32")
    scale = case.k**0.5
    np.testing.assert_allclose(np.asarray(found) / scale, np.asarray(expected) / scale, atol=RELATIVE[dtype])
    assert call(x, w, transposed=case.transposed, implementation=implementation).dtype == x.dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *QUANTIZED])
@pytest.mark.parametrize("implementation", [i.name for i in kv.OP.implementations if i.name != "reference"])
@pytest.mark.parametrize("case", KV_CASES, ids=lambda c: c.name)
def test_kv_write(case: KVCase, implementation: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    heads, dim, size = 2, 8, case.page_size
    count = len(case.query_lens)
    needed = [-(-c // size) for c in case.context_lens]
    tables = np.zeros((case.num_seqs, max(needed)), np.int32)
    free = list(rng.permutation(sum(needed)) + 1)
    for row, n in enumerate(needed):
        tables[row, :n] = [free.pop() for _ in range(n)]
    starts = np.full(case.num_seqs + 1, sum(case.query_lens), np.int32)
    starts[: count + 1] = np.concatenate([[0], np.cumsum(case.query_lens)])
    contexts = np.pad(np.asarray(case.context_lens, np.int32), (0, case.num_seqs - count))
    batch = RaggedBatch(jnp.asarray(starts), jnp.asarray(contexts), jnp.asarray(tables), jnp.int32(count))
    layout = KVLayout(sum(needed) + 1, heads, size, dim, dtype)
    old = jnp.asarray(rng.standard_normal(layout.shape), jnp.float32)
    pages = Pages(*quantize(old, dtype)) if layout.is_quantized else Pages(old.astype(dtype))
    keys, values = (jnp.asarray(rng.standard_normal((case.num_tokens, heads, dim)), jnp.float32) for _ in range(2))
    slots = kv.slots_of(batch, case.num_tokens, size)
    write = jax.jit(kv.kv_write, static_argnames="implementation")
    try:
        written = write(pages, keys, values, slots, implementation=implementation)
    except UnsupportedImplementationError as refused:
        pytest.skip(str(refused))
    found = np.asarray(dequantize(written))
    reference = np.asarray(dequantize(write(pages, keys, values, slots, implementation="reference")))
    np.testing.assert_array_equal(found[NULL_PAGE + 1 :], reference[NULL_PAGE + 1 :])
    assert written.data.dtype == pages.data.dtype

    expected, row = np.array(dequantize(pages)), 0  # and against loops that know nothing of slots
    for s, (length, context) in enumerate(zip(case.query_lens, case.context_lens, strict=True)):
        for position in range(context - length, context):
            expected[tables[s, position // size], 0, :, position % size] = keys[row]
            expected[tables[s, position // size], 1, :, position % size] = values[row]
            row += 1
    # Half a step of the largest number of a row (int8: 1/254), or of the number itself (fp8: 1/16, bfloat16: 1/256).
    atol = {"float32": 0.0, "bfloat16": 2e-2, "int8": 2e-2, "float8_e4m3fn": 0.2}[dtype]
    np.testing.assert_allclose(found[NULL_PAGE + 1 :], expected[NULL_PAGE + 1 :], atol=atol)


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_rows_are_written_by_several_threads(dtype: str) -> None:
    """Every row into a slot of its own, padding into a page that nobody reads; donated pages stay where they are."""
    rng, layout, rows = np.random.default_rng(2), KVLayout(130, 4, 16, 32, dtype), 2048
    keys, values = (jnp.asarray(rng.standard_normal((rows + 40, 4, 32)), dtype) for _ in range(2))
    slots = jnp.asarray(np.concatenate([rng.permutation(rows) + 16, np.arange(40) % 16]), jnp.int32)
    found = {}
    for name in ("native_cpu", "xla"):
        write = jax.jit(partial(kv.kv_write, implementation=name), donate_argnums=0)
        pages = layout.empty()
        place = pages.data.unsafe_buffer_pointer()
        written = write(pages, keys, values, slots)
        assert written.data.unsafe_buffer_pointer() == place
        found[name] = np.asarray(written.data[NULL_PAGE + 1 :], np.float32)
    np.testing.assert_array_equal(found["native_cpu"], found["xla"])


def test_rows_view_addresses_one_head_of_one_page() -> None:
    layout = KVLayout(5, 3, 8, 4, "float32")
    pages = jnp.arange(np.prod(layout.shape), dtype=jnp.float32).reshape(layout.shape)
    np.testing.assert_array_equal(rows_view(pages)[(4 * 2 + 1) * 3 + 2], pages[4, 1, 2].ravel())
    assert layout.page_bytes == pages[0].nbytes


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantized_layout(dtype: str) -> None:
    layout = KVLayout(5, 3, 8, 4, dtype)
    pages = layout.empty()
    assert pages.scales is not None and pages.scales.shape == layout.shape[:-1]
    assert layout.page_bytes == (pages.data.nbytes + pages.scales.nbytes) // layout.num_pages


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127), ("float8_e4m3fn", 448)])
def test_quantize(dtype: str, largest: int) -> None:
    """The largest magnitude of a row becomes the largest number, zeros stay zeros, and nothing overflows."""
    x = jnp.asarray([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0], [3e38, 0.0, -3e38]])
    stored, scale = quantize(x, dtype)
    np.testing.assert_array_equal(np.abs(np.asarray(stored, np.float32)).max(-1), [largest, 0, largest])
    np.testing.assert_allclose(scale, [2 / largest, 0, 3e38 / largest], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(stored, np.float32) * np.asarray(scale)[:, None], x, rtol=0.07, atol=0.01)
