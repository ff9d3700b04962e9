"""Attention in C++ on a CPU: what it promises beyond the suite of all implementations (`test_paged_attention.py`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.device import Device
from pallas_kernels.kv_layout import Pages
from pallas_kernels.op import UnsupportedImplementationError
from pallas_kernels.paged_attention import OP, AttentionProblem, native_cpu, paged_attention, plan_attention
from pallas_kernels.ragged import RaggedBatch

ROOT = Path(__file__).resolve().parents[2]
HEADS, KV_HEADS, DIM, PAGE, CONTEXT = 6, 2, 40, 16, 600
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float16", "float8_e4m3fn")]

needs_compiler = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


def inputs(dtype: str, kv_dtype: str) -> tuple[jax.Array, Pages]:
    """Queries of a whole sequence, and its pages in order; page 0 is not its own."""
    rng = np.random.default_rng(7)
    shape = (-(-CONTEXT // PAGE) + 1, 2, KV_HEADS, PAGE, DIM)
    data = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    scales = None
    if kv_dtype in ("int8", "float8_e4m3fn"):
        data, scales = data * 30, jnp.asarray(rng.uniform(0.02, 0.05, shape[:4]), jnp.float32)
    return jnp.asarray(rng.standard_normal((CONTEXT, HEADS, DIM)), dtype), Pages(data.astype(kv_dtype), scales)


def attend(
    q: jax.Array, pages: Pages, pieces: list[tuple[int, int]], window: int | None, implementation: str = "native_cpu"
) -> list[np.ndarray]:
    """Results of pieces `(first position, end)` of the sequence, all in one batch."""
    lengths = [end - first for first, end in pieces]
    table = jnp.arange(1, pages.data.shape[0], dtype=jnp.int32)
    batch = RaggedBatch(
        jnp.asarray(np.cumsum([0, *lengths]), jnp.int32),
        jnp.asarray([end for _, end in pieces], jnp.int32),
        jnp.tile(table, (len(pieces), 1)),
        jnp.int32(len(pieces)),
    )
    rows = jnp.concatenate([q[first:end] for first, end in pieces])
    problem = AttentionProblem(HEADS, KV_HEADS, DIM, PAGE, str(q.dtype), str(pages.data.dtype), implementation)

    @jax.jit
    def call(rows: jax.Array, pages: Pages, batch: RaggedBatch) -> jax.Array:
        plan = plan_attention(batch, rows.shape[0], problem)
        return paged_attention(rows, pages, plan, problem, scale=DIM**-0.5, window=window)

    return np.split(np.asarray(call(rows, pages, batch), np.float32), np.cumsum(lengths)[:-1])


@needs_compiler
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_a_row_has_the_same_bits_however_its_prompt_is_cut(dtype: str, kv_dtype: str, window: int | None) -> None:
    """Whole, in chunks, alone (where a tile's chunks are computed apart), and among others."""
    q, pages = inputs(dtype, kv_dtype)
    (whole,) = attend(q, pages, [(0, CONTEXT)], window)
    for pieces in ([(0, 7), (7, 300), (300, 333), (333, 600)], [(599, 600)], [(595, 600), (255, 256), (256, 258)]):
        for (first, end), found in zip(pieces, attend(q, pages, pieces, window), strict=True):
            np.testing.assert_array_equal(found, whole[first:end])
    (expected,) = attend(q.astype(jnp.float32), pages, [(500, 600)], window, "reference")
    tolerance = {"float32": 2e-6, "bfloat16": 1.6e-2, "float16": 2e-3}[dtype]
    np.testing.assert_allclose(whole[500:], expected, atol=tolerance, rtol=tolerance)


@needs_compiler
def test_a_long_context_in_parts() -> None:
    """One row over a context that two threads share gives the bits of a row in a tile that one thread walks over."""
    rng = np.random.default_rng(8)
    pages = Pages(jnp.asarray(rng.standard_normal((257, 2, KV_HEADS, PAGE, DIM)), jnp.float32))
    q = jnp.asarray(rng.standard_normal((4096, HEADS, DIM)), jnp.float32)
    (alone,) = attend(q, pages, [(4095, 4096)], None)
    among = attend(q, pages, [(4000, 4096), *[(90 * i, 90 * i + 90) for i in range(12)]], None)
    np.testing.assert_array_equal(alone[0], among[0][-1])


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_far_apart(dtype: str) -> None:
    """Weights that vanish are 0, the others are right; a key that is not a number stays with the rows that see it."""
    q, pages = inputs(dtype, dtype)
    pages = Pages(pages.data.at[20, 0, :, 3].multiply(1e4))
    (found,) = attend(q, pages, [(0, CONTEXT)], None)
    wide = Pages(pages.data.astype(jnp.float32))
    (expected,) = attend(q.astype(jnp.float32), wide, [(400, 600)], None, "reference")
    np.testing.assert_allclose(found[400:], expected, atol=2e-2 if dtype == "bfloat16" else 2e-5)
    broken = Pages(pages.data.at[20, 0, 0, 3, 0].set(jnp.nan))  # position 307 of kv head 0
    (found,) = attend(q, broken, [(0, CONTEXT)], None)
    assert np.isnan(found[307:, :3]).all()
    assert np.isfinite(found[:307]).all() and np.isfinite(found[:, 3:]).all()


def test_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = AttentionProblem(9, 3, 64, 16, "bfloat16", "bfloat16")
    cpu = Device(platform="cpu", kind="cpu", num_cores=2)
    for dots, reason in ((True, None), (False, "AVX-512")):
        monkeypatch.setattr(native, "has_bfloat16_dots", lambda dots=dots: dots)
        found = native_cpu.yields(problem, cpu)
        assert found is None if reason is None else reason in (found or "")
    assert "needs a CPU" in (native_cpu.device_reason(Device(platform="gpu", kind="H200", num_cores=132)) or "")
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler")
    assert OP.choose("auto", problem).name == "xla"
    assert "native_cpu refused: no compiler" in OP.chosen["paged_attention"]
    strict = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "page_size": 16, "implementation": "native_cpu"}
    for wrong, named in (({"dtype": "float64"}, "float64"), ({"kv_dtype": "int4"}, "int4"), ({}, "no compiler")):
        refused = AttentionProblem(**{**strict, "dtype": "float32", "kv_dtype": "float32", **wrong})
        with pytest.raises(UnsupportedImplementationError, match=named):
            OP.choose("native_cpu", refused)


_PORTABLE = """
import sys
import numpy as np
from pallas_kernels.native import library
library._settings = library.Settings(machine=sys.argv[1])
assert not library.has_bfloat16_dots()
from tests.kernels import test_native_attention, test_paged_attention
from tests.kernels.test_paged_attention import CASES, GRID
for case, dtype, kv_dtype in GRID:
    test_paged_attention.test_against_reference(case, "native_cpu", dtype, kv_dtype)
for dtypes in test_native_attention.DTYPES:
    for window in (None, 100):
        test_native_attention.test_a_row_has_the_same_bits_however_its_prompt_is_cut(*dtypes, window)
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("machine", ["-march=x86-64", "-march=x86-64-v3", "-march=x86-64-v4"])
def test_processors_without_dots_of_bfloat16(machine: str) -> None:
    """In a process whose library knows no bfloat16, and no AVX-512 or AVX."""
    command = [sys.executable, "-c", _PORTABLE, machine]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
