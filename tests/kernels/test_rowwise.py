"""Norms, gates and heads: every implementation against the reference, and what the native ones promise beyond."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.device import current_device
from pallas_kernels.rowwise import ACTIVATIONS, OP, Heads, RowwiseProblem, add_norm, gate, heads, norm, turns

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16", "float16")
ULP = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-9}  # of the result's size: two roundings may go either way
needs_compiler = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

Call = Callable[[str], Any]


def rows_of(seed: int, *shape: int, dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 2, dtype)


def calls(num_rows: int, size: int, dtype: str) -> dict[str, Call]:
    """Every function on its own operands; the first rows are the same for each number of rows."""
    x, residual, weight = (rows_of(seed, 24, size, dtype=dtype) for seed in (1, 2, 3))
    x, residual, weight = x[:num_rows], residual[:num_rows], weight[0]
    layout = Heads(4, 2, size)
    qkv = rows_of(4, 24, 8 * size, dtype=dtype)[:num_rows]
    positions = np.random.default_rng(5).integers(0, 9000, 24)[:num_rows, None]
    partial_size = max(size // 4, 1) * 2
    angles = jnp.asarray(positions / 10.0 ** (np.arange(partial_size // 2) % 40), jnp.float32)
    normed = (weight, residual[0])
    of = {
        "norm": lambda i: norm(x, weight, 1e-5, i),
        "norm of heads": lambda i: norm(qkv.reshape(num_rows, 8, size), weight, 1e-6, i),
        "add_norm": lambda i: add_norm(x, residual, weight, 1e-5, i),
        "turns": lambda i: turns(angles, 1.25, i),
        "heads": lambda i: heads(qkv, layout, turns(angles, 1.0, i), None, 0.0, i),
        "normed heads": lambda i: heads(qkv, layout, turns(angles, 1.0, i), normed, 1e-6, i),
        "heads that do not turn": lambda i: heads(qkv, layout, None, normed, 1e-6, i),
        "plain heads": lambda i: heads(qkv, layout, None, None, 0.0, i),
    }
    for activation in ACTIVATIONS:
        of[activation] = lambda i, a=activation: gate(qkv, a, i)
    return of


NAMES = sorted(calls(1, 4, "float32"))


def run(call: Call, implementation: str) -> list[np.ndarray]:
    return [np.asarray(each, np.float32) for each in jax.tree.leaves(jax.jit(lambda: call(implementation))())]


def refuses(name: str, implementation: str, dtype: str) -> bool:
    problem = RowwiseProblem(name, dtype, name if name in ACTIVATIONS else None)
    return any(i.name == implementation and i.refuses(problem, current_device()) for i in OP.implementations)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 50])
@pytest.mark.parametrize("implementation", ["native_cpu", "xla"])
def test_as_the_reference(implementation: str, size: int, dtype: str) -> None:
    tried = 0
    for name, call in calls(24, size, dtype).items():
        if refuses(name, implementation, dtype):
            continue
        tried += 1
        for found, expected in zip(run(call, implementation), run(call, "reference"), strict=True):
            assert found.shape == expected.shape
            limit = ULP[dtype] * np.maximum(np.abs(expected), 0.1 * np.abs(expected).max())
            assert (np.abs(found - expected) <= limit).all(), name
    assert tried >= len(NAMES) - 1


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 50, 7000])
def test_rows_are_as_if_they_were_alone(size: int, dtype: str) -> None:
    """Bit for bit, in pieces of one row and of many, of whole vectors and not."""
    whole = {name: run(call, "native_cpu") for name, call in calls(24, size, dtype).items() if name != "gelu"}
    for count in (1, 2, 5, 16):
        part = {name: run(call, "native_cpu") for name, call in calls(count, size, dtype).items() if name != "gelu"}
        for name, arrays in part.items():
            for some, every in zip(arrays, whole[name], strict=True):
                np.testing.assert_array_equal(some, every[:count], err_msg=name)


@needs_compiler
def test_what_is_not_finite_stays_in_its_row() -> None:
    x = rows_of(1, 3, 40, dtype="bfloat16").at[1, 39].set(jnp.nan)
    for found in (norm(x, x[0], 1e-5), gate(x, "silu"), *add_norm(x, x, x[0], 1e-5)):
        assert np.isnan(np.asarray(found[1], np.float32)).any()
        assert np.isfinite(np.asarray(found, np.float32)[[0, 2]]).all()
    large = jnp.asarray([[-jnp.inf, 3e38, -3e38, 0.0] + [1.0] * 4], jnp.float32)
    np.testing.assert_allclose(np.asarray(gate(large, "silu"))[0, 1:], [3e38, 0.0, 0.0], rtol=1e-6)


@needs_compiler
def test_the_refusal_says_why() -> None:
    native_cpu = OP.implementations[0]
    assert "activation is gelu" in str(native_cpu.supports(RowwiseProblem("gate", "float32", "gelu")))
    assert "rows are int8" in str(native_cpu.supports(RowwiseProblem("norm", "int8")))


_PORTABLE = """
import sys
from pallas_kernels.native import library
library._settings = library.Settings(machine=sys.argv[1])
from tests.kernels.test_rowwise import test_as_the_reference, test_rows_are_as_if_they_were_alone
for dtype in ("float32", "bfloat16", "float16"):
    test_as_the_reference("native_cpu", 50, dtype)
    test_rows_are_as_if_they_were_alone(50, dtype)
print("all right")
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("machine", ["-march=x86-64", "-march=x86-64-v3", "-march=x86-64-v4"])
def test_other_processors(machine: str) -> None:
    command = [sys.executable, "-c", _PORTABLE, machine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "all right\n", done.stderr[-2000:]
