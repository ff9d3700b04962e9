"""Dense products in C++ on a CPU: what they promise beyond the suite of all (`test_matmul_and_kv_write.py`)."""

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
from pallas_kernels.matmul import OP, MatmulProblem, matmul, native_cpu
from pallas_kernels.op import UnsupportedImplementationError

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16", "float16")
call = jax.jit(matmul, static_argnames=("transposed", "out_dtype", "implementation"))

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


def operands(rows: int, k: int, n: int, dtype: str, transposed: bool) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(30)
    shape = (n, k) if transposed else (k, n)
    return jnp.asarray(rng.standard_normal((rows, k)), dtype), jnp.asarray(rng.standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("k", "n"), [(2176, 45), (100, 300), (33, 1)])
def test_rows_are_as_if_they_were_alone(k: int, n: int, transposed: bool, dtype: str) -> None:
    """Bit for bit, with few rows and with many, in sums of more than one chunk; and right."""
    x, weight = operands(300, k, n, dtype, transposed)
    whole = np.asarray(call(x, weight, transposed=transposed, implementation="native_cpu", out_dtype="float32"))
    for first, last in ((0, 1), (1, 3), (3, 10), (10, 34), (34, 60), (290, 300)):
        part = call(x[first:last], weight, transposed=transposed, implementation="native_cpu", out_dtype="float32")
        np.testing.assert_array_equal(part, whole[first:last])
    expected = np.asarray(x, np.float64) @ (
        np.asarray(weight, np.float64).T if transposed else np.asarray(weight, np.float64)
    )
    np.testing.assert_allclose(whole, expected, atol=3e-6 * np.abs(expected).max())
    narrow = call(x, weight, transposed=transposed, implementation="native_cpu")
    assert narrow.dtype == x.dtype
    np.testing.assert_array_equal(narrow, jnp.asarray(whole).astype(dtype))


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_not_finite_stays_in_its_row_and_output(transposed: bool) -> None:
    """Padding, of inputs, outputs and rows, is of zeros that meet zeros."""
    x, weight = operands(3, 33, 70, "bfloat16", transposed)
    x = x.at[1, 32].set(jnp.nan)
    weight = weight.at[(69, 32) if transposed else (32, 69)].set(jnp.inf)
    found = np.asarray(call(x, weight, transposed=transposed, implementation="native_cpu"), np.float32)
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2], :69]).all() and np.isinf(found[[0, 2], 69]).all()


def test_operands_of_two_dtypes() -> None:
    x, weight = operands(5, 64, 48, "float32", False)
    for dtype in ("bfloat16", "float16"):
        narrow = weight.astype(dtype)
        found = call(x, narrow, implementation="native_cpu")
        np.testing.assert_allclose(found, x @ narrow.astype(jnp.float32), rtol=1e-5, atol=1e-5)


def test_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Device(platform="cpu", kind="cpu", num_cores=2)
    for dots, rows, dtype, reason in (
        (True, 256, "bfloat16", None),
        (True, 257, "bfloat16", "257 rows"),
        (False, 1, "bfloat16", "AVX-512"),
        (False, 512, "float16", None),
        (True, 1, "float32", "speed of memory"),
    ):
        monkeypatch.setattr(native, "has_bfloat16_dots", lambda dots=dots: dots)
        found = native_cpu.yields(MatmulProblem(rows, 64, 64, dtype, dtype, False), cpu)
        assert found is None if reason is None else reason in (found or "")
    assert OP.choose("auto", MatmulProblem(0, 64, 64, "bfloat16", "bfloat16", False)).name == "xla"
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler")
    with pytest.raises(UnsupportedImplementationError, match="no compiler"):
        OP.choose("native_cpu", MatmulProblem(1, 64, 64, "bfloat16", "bfloat16", False))
    assert OP.choose("auto", MatmulProblem(1, 64, 64, "bfloat16", "bfloat16", False)).name == "xla"
    with pytest.raises(UnsupportedImplementationError, match="int8"):
        OP.choose("native_cpu", MatmulProblem(1, 64, 64, "bfloat16", "int8", False))


_PORTABLE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from pallas_kernels.matmul import matmul
from pallas_kernels.native import library
library._settings = library.Settings(machine=sys.argv[1])
assert not library.has_bfloat16_dots()
call = jax.jit(matmul, static_argnames=("transposed", "out_dtype", "implementation"))
rng = np.random.default_rng(1)
for k, n in ((1100, 45), (64, 576), (33, 1)):
    for rows in (1, 7, 24, 25, 150):
        for transposed in (False, True):
            for dtype in ("float32", "bfloat16", "float16"):
                x = jnp.asarray(rng.standard_normal((rows, k)), dtype)
                weight = jnp.asarray(rng.standard_normal((n, k) if transposed else (k, n)), dtype)
                found, expected = (
                    np.asarray(call(x, weight, transposed=transposed, implementation=i, out_dtype="float32"))
                    for i in ("native_cpu", "reference")
                )
                np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())
"""


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["-march=x86-64", "-march=x86-64-v3", "-march=x86-64-v4"])
def test_processors_without_dots_of_bfloat16(machine: str) -> None:
    """In a process whose library knows no bfloat16, and no AVX-512 or AVX."""
    command = [sys.executable, "-c", _PORTABLE, machine]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
