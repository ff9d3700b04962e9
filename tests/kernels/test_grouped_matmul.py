"""The grouped product against its reference and against loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import OP, grouped_matmul
from pallas_kernels.grouped_matmul.cases import CASES, GPU_CASES, Case
from pallas_kernels.op import UnsupportedImplementationError
from pallas_kernels.quantized_matmul import QuantizedWeight, from_dense, quantized_matmul

TOLERANCE = {"float32": 3e-6, "bfloat16": 4e-3}  # of the largest result, see test_quantized_matmul.py
IMPLEMENTATIONS = [i.name for i in OP.implementations if i.name not in ("reference", "mosaic_gpu_simulated")]
call = jax.jit(grouped_matmul, static_argnames=("out_dtype", "implementation"))


def make_inputs(case: Case, dtype: str) -> tuple[jax.Array, jax.Array | QuantizedWeight, jax.Array]:
    rng = np.random.default_rng(0)
    dense = jnp.asarray(rng.standard_normal((len(case.group_sizes), case.k, case.n)) * case.k**-0.5, dtype)
    weight = dense if case.kind == "dense" else from_dense(dense, case.kind, case.group_size)
    x = jnp.asarray(rng.standard_normal((case.num_tokens, case.k)), dtype)
    return x, weight, jnp.asarray(case.group_sizes, jnp.int32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_reference_against_loops(case: Case) -> None:
    x, weight, sizes = make_inputs(case, "float32")
    found, row = np.asarray(call(x, weight, sizes, implementation="reference")), 0
    for expert, size in enumerate(case.group_sizes):
        own = jax.tree.map(lambda leaf, e=expert: leaf[e], weight)
        for t in range(row, row + size):
            if isinstance(own, QuantizedWeight):
                expected = quantized_matmul(x[t : t + 1], own, implementation="reference")[0]
            else:
                expected = np.asarray(x[t], np.float64) @ np.asarray(own, np.float64)
            np.testing.assert_allclose(found[t], expected, atol=2e-6 * max(1.0, float(np.abs(expected).max())))
        row += size
    assert not found[row:].any(), "rows of no expert must be 0"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_reference(case: Case, implementation: str, dtype: str) -> None:
    x, weight, sizes = make_inputs(case, dtype)
    expected = np.asarray(call(x, weight, sizes, implementation="reference", out_dtype="float32"))
    live = sum(case.group_sizes)
    poisoned = x.at[live:].set(jnp.nan)
    try:
        found = np.asarray(call(poisoned, weight, sizes, implementation=implementation, out_dtype="float32"))
    except UnsupportedImplementationError as refused:
        pytest.skip(str(refused))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype] * max(1.0, np.abs(expected).max()))
    assert call(x, weight, sizes, implementation=implementation).dtype == x.dtype


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_at_the_wrong_expert_is_seen(implementation: str) -> None:
    case = Case("", (3, 4, 1), 64, 32)
    x, weight, sizes = make_inputs(case, "bfloat16")
    right = np.asarray(call(x, weight, sizes, implementation="reference", out_dtype="float32"))
    wrong = np.asarray(call(x, weight, jnp.asarray([4, 3, 1]), implementation=implementation, out_dtype="float32"))
    assert np.abs(right - wrong)[3].max() > 20 * TOLERANCE["bfloat16"] * np.abs(right).max()
    np.testing.assert_allclose(np.delete(wrong, 3, 0), np.delete(right, 3, 0), atol=TOLERANCE["bfloat16"] * 4)


def test_refuses_shapes_that_do_not_meet() -> None:
    with pytest.raises(ValueError, match="do not meet"):
        grouped_matmul(jnp.ones((4, 8)), jnp.ones((2, 16, 3)), jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match="do not meet"):
        grouped_matmul(jnp.ones((4, 16)), jnp.ones((2, 16, 3)), jnp.ones(3, jnp.int32))


def test_case_names_are_unique() -> None:
    names = [case.name for case in (*CASES, *GPU_CASES)]
    assert len(set(names)) == len(names)
