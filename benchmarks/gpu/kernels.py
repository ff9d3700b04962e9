"""Inputs of every operation of `pallas_kernels` and how far an implementation is from the reference on them.

An operation's small cases are those of its tests, with its tests' tolerances; its GPU cases (`Op.gpu_cases`) bring
inputs and tolerance themselves.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.part import Record, Skip
from pallas_kernels import kv_write as kv
from pallas_kernels import matmul as mm
from pallas_kernels.device import current_device
from pallas_kernels.kv_layout import NULL_PAGE, KVLayout, Pages, dequantize, quantize
from pallas_kernels.kv_write.cases import CASES as KV_CASES
from pallas_kernels.matmul.cases import CASES as MATMUL_CASES
from pallas_kernels.op import GpuCase, Op, UnsupportedImplementationError
from pallas_kernels.paged_attention import AttentionProblem, paged_attention, plan_attention
from pallas_kernels.paged_attention.cases import CASES as ATTENTION_CASES
from pallas_kernels.paged_attention.cases import Case as AttentionCase
from pallas_kernels.ragged import RaggedBatch
from pallas_kernels.registry import OPS

REFERENCE, SIMULATED = "reference", "mosaic_gpu_simulated"


@dataclass(frozen=True)
class Comparison:
    """What came out of an implementation, and what should have.

    Attributes:
        found, expected: arrays of one shape.
        tolerance: largest allowed difference, in units of `scale`.
        scale: of the results; 1 where the tolerance is absolute.
        relative: also allowed, times the expected value.
    """

    found: np.ndarray
    expected: np.ndarray
    tolerance: float
    scale: float = 1.0
    relative: float = 0.0

    def as_record(self) -> Record:
        """How far they are apart: `error` is 1 at the edge of what is allowed."""
        found, expected = self.found.astype(np.float64), self.expected.astype(np.float64)
        allowed = self.tolerance * self.scale + self.relative * np.abs(expected)
        gap = np.abs(found - expected)
        worst = float(np.where(np.isfinite(found), gap / allowed, np.inf).max(initial=0.0))
        return {
            "ok": worst <= 1.0,
            "error": worst,
            "max_difference": float(np.nanmax(gap, initial=0.0)),
            "not_finite": int((~np.isfinite(found)).sum()),
            "tolerance": self.tolerance,
        }


Compare = Callable[[str], Comparison]
"""Gets an implementation's name; raises UnsupportedImplementationError if it cannot run the case here."""


def op_named(name: str) -> Op:
    """An operation of the registry.

    Raises:
        Skip: there is none of that name.
    """
    for op in OPS:
        if op.name == name:
            return op
    raise Skip(f"not built yet: the registry has no op {name!r}; it has {', '.join(op.name for op in OPS)}")


def implementations(op: Op, *, smoke: bool) -> list[str]:
    """Names of the implementations to check: all but the reference; the simulated twins of kernels in smoke runs only,
    and the kernels themselves only elsewhere.
    """
    leave_out = {REFERENCE, "mosaic_gpu" if smoke else SIMULATED}
    return [i.name for i in op.implementations if i.name not in leave_out]


@cache
def _gpu_cases(name: str) -> dict[str, GpuCase]:
    return {case.name: case for case in op_named(name).gpu_cases()}


def gpu_case(op: Op, name: str) -> GpuCase:
    """One of an operation's GPU cases."""
    return _gpu_cases(op.name)[name]


def compare_gpu_case(op: Op, case: GpuCase, implementation: str) -> Comparison:
    """A GPU case against XLA's result, as the case's own tolerance is meant."""
    arguments = jax.device_put(case.sample(0))
    expected = _flat(jax.jit(case.function("xla", None))(*arguments))
    found = _flat(jax.jit(case.function(implementation, None))(*arguments))
    return Comparison(found, expected, case.tolerance, float(np.sqrt(np.mean(expected.astype(np.float64) ** 2))) or 1.0)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(tree)])


def refuse(op: Op, implementation: str, error: UnsupportedImplementationError) -> Skip:
    """The reason why an implementation does not take a case, without the problem's description."""
    reason = str(error).rsplit("): ", 1)[-1]
    return Skip(f"{op.name}: {implementation} refuses: {reason}")


# Paged attention

ATTENTION_TOLERANCE = {"float32": 2e-6, "bfloat16": 1.6e-2, "float16": 2e-3}
ATTENTION_DTYPES = (
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "float32"),
    ("bfloat16", "int8"),
    ("bfloat16", "float8_e4m3fn"),
)
# As large as a server's steps, in heads and contexts; small enough for the reference, which has all scores at once.
LARGE_ATTENTION_CASES: tuple[AttentionCase, ...] = tuple(
    AttentionCase(name, queries, contexts, num_heads=heads, num_kv_heads=kv_heads, head_dim=128, **more)  # type: ignore[arg-type]
    for name, queries, contexts, heads, kv_heads, more in (
        ("large decode", (1,) * 6, (4096, 1, 517, 2048, 4095, 3333), 32, 8, {"num_tokens": 8, "num_seqs": 8}),
        ("large decode, page 32", (1,) * 6, (4096, 1, 517, 2048, 4095, 3333), 32, 8, {"page_size": 32}),
        ("large decode, 28 over 4 heads", (1,) * 4, (1500, 1023, 1024, 1025), 28, 4, {}),
        ("large prefill", (256,), (256,), 32, 8, {}),
        ("large chunk", (130,), (1200,), 32, 8, {"num_tokens": 256, "num_seqs": 8, "max_blocks": 128}),
        (
            "large mixed",
            (1, 70, 1, 1, 40),
            (1000, 70, 33, 1200, 900),
            16,
            8,
            {"num_tokens": 128, "num_seqs": 8, "max_blocks": 128},
        ),
    )
)


def attention_inputs(
    case: AttentionCase, dtype: str, kv_dtype: str, poison: float
) -> tuple[jax.Array, Pages, RaggedBatch]:
    """Random queries and pages; what no query may see is `poison`, and so are the entries of block tables beyond a
    context: they name a page of poison.
    """
    rng = np.random.default_rng(2)
    tables, num_pages = case.block_tables(rng)
    size = case.page_size
    numbers = rng.standard_normal((num_pages + 3, 2, case.num_kv_heads, size, case.head_dim)).astype(np.float32)
    visible = np.zeros((num_pages + 3, size), bool)
    positions = np.arange(tables.shape[1] * size)
    for row, context in enumerate(case.context_lens):
        seen = positions[:context]
        visible[tables[row, seen // size], seen % size] = True
        tables[row, -(-context // size) :] = num_pages + 1
    tables[len(case.context_lens) :] = num_pages + 1
    hidden = jnp.asarray(~visible)
    if kv_dtype in ("int8", "float8_e4m3fn"):
        stored, scales = quantize(jnp.asarray(numbers), kv_dtype)
        pages = Pages(stored, jnp.where(hidden[:, None, None, :], poison, scales))
    else:
        pages = Pages(jnp.where(hidden[:, None, None, :, None], poison, jnp.asarray(numbers)).astype(kv_dtype))
    q = rng.standard_normal((case.padded_tokens, case.num_heads, case.head_dim)).astype(np.float32)
    return jnp.asarray(q, dtype), pages, ragged(case.query_lens, case.context_lens, tables)


def ragged(query_lens: Sequence[int], context_lens: Sequence[int], tables: np.ndarray) -> RaggedBatch:
    """The batch of some sequences; the tables have a row for each, and for padding."""
    count = len(query_lens)
    starts = np.full(tables.shape[0] + 1, sum(query_lens), np.int32)
    starts[: count + 1] = np.concatenate([[0], np.cumsum(query_lens)])
    contexts = np.zeros(tables.shape[0], np.int32)
    contexts[:count] = context_lens
    return RaggedBatch(jnp.asarray(starts), jnp.asarray(contexts), jnp.asarray(tables), jnp.int32(count))


def attention_problem(case: AttentionCase, dtype: str, kv_dtype: str, implementation: str) -> AttentionProblem:
    """The problem of a case."""
    return AttentionProblem(
        case.num_heads, case.num_kv_heads, case.head_dim, case.page_size, dtype, kv_dtype, implementation
    )


def _attend(case: AttentionCase, dtype: str, kv_dtype: str, implementation: str, poison: float) -> np.ndarray:
    q, pages, batch = attention_inputs(case, dtype, kv_dtype, poison)
    if implementation == REFERENCE:
        q = q.astype(jnp.float32)
        pages = pages if pages.scales is not None else Pages(pages.data.astype(jnp.float32))
    problem = attention_problem(case, str(q.dtype), str(pages.data.dtype), implementation)
    sinks = jnp.linspace(-1.0, 4.0, case.num_heads) if case.sinks else None

    @jax.jit
    def call(q: jax.Array, pages: Pages, batch: RaggedBatch) -> jax.Array:
        plan = plan_attention(batch, case.padded_tokens, problem)
        options = {"window": case.window, "soft_cap": case.soft_cap, "sinks": sinks}
        return paged_attention(q, pages, plan, problem, scale=case.head_dim**-0.5, **options)

    return np.array(call(q, pages, batch), np.float32)


def _compare_attention(case: AttentionCase, dtype: str, kv_dtype: str, implementation: str) -> Comparison:
    found = _attend(case, dtype, kv_dtype, implementation, float("nan"))
    expected = _attend(case, dtype, kv_dtype, REFERENCE, 0.0)
    expected[sum(case.query_lens) :] = 0.0  # padding rows
    tolerance = ATTENTION_TOLERANCE[dtype]
    return Comparison(found, expected, tolerance, relative=tolerance)


# KV write


def _compare_kv_write(case: Any, dtype: str, implementation: str) -> Comparison:
    rng = np.random.default_rng(1)
    heads, dim, size = 2, 64, case.page_size
    needed = [-(-context // size) for context in case.context_lens]
    tables = np.zeros((case.num_seqs, max(needed)), np.int32)
    free = iter((rng.permutation(sum(needed)) + 1).tolist())
    for row, num in enumerate(needed):
        tables[row, :num] = [next(free) for _ in range(num)]
    batch = ragged(case.query_lens, case.context_lens, tables)
    layout = KVLayout(sum(needed) + 1, heads, size, dim, dtype)
    old = jnp.asarray(rng.standard_normal(layout.shape), jnp.float32)
    pages = Pages(*quantize(old, dtype)) if layout.is_quantized else Pages(old.astype(dtype))
    keys, values = (jnp.asarray(rng.standard_normal((case.num_tokens, heads, dim)), jnp.float32) for _ in range(2))
    slots = kv.slots_of(batch, case.num_tokens, size)
    write = jax.jit(kv.kv_write, static_argnames="implementation")
    found, expected = (
        np.asarray(dequantize(write(pages, keys, values, slots, implementation=name)))[NULL_PAGE + 1 :]
        for name in (implementation, REFERENCE)
    )
    return Comparison(found, expected, 1e-30)  # the same bits


# Matrix products

MATMUL_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
QUANTIZED_TOLERANCE = {"float32": 3e-6, "bfloat16": 4e-3, "float16": 5e-4}


def _compare_matmul(case: Any, dtype: str, implementation: str) -> Comparison:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((case.m, case.k)), dtype)
    weight = jnp.asarray(rng.standard_normal((case.n, case.k) if case.transposed else (case.k, case.n)), dtype)
    call = jax.jit(mm.matmul, static_argnames=("transposed", "implementation", "out_dtype"))
    found, expected = (
        np.asarray(call(x, weight, transposed=case.transposed, implementation=name, out_dtype="float32"))
        for name in (implementation, REFERENCE)
    )
    return Comparison(found, expected, MATMUL_TOLERANCE[dtype], case.k**0.5)


def _compare_quantized(module: Any, case: Any, dtype: str, implementation: str) -> Comparison:
    rng = np.random.default_rng(0)
    weight, x = case.weight(rng), case.activations(rng, dtype)
    call = jax.jit(module.quantized_matmul, static_argnames=("implementation", "out_dtype"))
    found, expected = (
        np.asarray(call(x, weight, implementation=name, out_dtype="float32"), np.float32)
        for name in (implementation, REFERENCE)
    )
    return Comparison(found, expected, QUANTIZED_TOLERANCE[dtype], float(np.abs(expected).max()))


def small_cases(op: Op, *, smoke: bool) -> dict[str, Callable[[str], Comparison]]:
    """Name -> comparison of the small cases of an operation, in each dtype. Empty if this file does not know it.

    A smoke run takes two of them.
    """
    found = _SMALL[op.name]() if op.name in _SMALL else {}
    return dict(list(found.items())[:2]) if smoke else found


def _attention_checks() -> dict[str, Compare]:
    checks: dict[str, Compare] = {}
    for case in (*ATTENTION_CASES, *LARGE_ATTENTION_CASES):
        for dtype, kv_dtype in ATTENTION_DTYPES:
            checks[f"{case.name}, {dtype} over {kv_dtype}"] = lambda name, c=case, d=dtype, k=kv_dtype: (
                _compare_attention(c, d, k, name)
            )
    return checks


def _kv_checks() -> dict[str, Compare]:
    return {
        f"{case.name}, {dtype}": lambda name, c=case, d=dtype: _compare_kv_write(c, d, name)
        for case in KV_CASES
        for dtype in ("bfloat16", "float32", "int8", "float8_e4m3fn")
    }


def _matmul_checks() -> dict[str, Compare]:
    return {
        f"{case.name}, {dtype}": lambda name, c=case, d=dtype: _compare_matmul(c, d, name)
        for case in MATMUL_CASES
        for dtype in MATMUL_TOLERANCE
    }


def _quantized_checks() -> dict[str, Compare]:
    package = "pallas_kernels.quantized_matmul"
    if importlib.util.find_spec(package) is None:
        return {}
    module, cases = importlib.import_module(package), importlib.import_module(f"{package}.cases").CASES
    return {
        f"{case.name}, {dtype}": lambda name, c=case, d=dtype: _compare_quantized(module, c, d, name)
        for case in cases
        for dtype in ("bfloat16", "float16")
    }


def _compare_grouped(module: Any, packed: Any, case: Any, dtype: str, implementation: str) -> Comparison:
    rng = np.random.default_rng(0)
    shape = (len(case.group_sizes), case.k, case.n)
    dense = jnp.asarray(rng.standard_normal(shape) * case.k**-0.5, jnp.float32)
    weight = dense.astype(dtype) if case.kind == "dense" else packed.from_dense(dense, case.kind, case.group_size)
    x = jnp.asarray(rng.standard_normal((case.num_tokens, case.k)), dtype)
    sizes = jnp.asarray(case.group_sizes, jnp.int32)
    call = jax.jit(module.grouped_matmul, static_argnames=("implementation", "out_dtype"))
    found, expected = (
        np.asarray(call(x, weight, sizes, implementation=name, out_dtype="float32"), np.float32)
        for name in (implementation, REFERENCE)
    )
    return Comparison(found, expected, QUANTIZED_TOLERANCE[dtype], max(1.0, float(np.abs(expected).max(initial=0.0))))


def _grouped_checks() -> dict[str, Compare]:
    package = "pallas_kernels.grouped_matmul"
    if importlib.util.find_spec(package) is None:
        return {}
    module, cases = importlib.import_module(package), importlib.import_module(f"{package}.cases").CASES
    packed = importlib.import_module("pallas_kernels.quantized_matmul.weight")
    return {
        f"{case.name}, {dtype}": lambda name, c=case, d=dtype: _compare_grouped(module, packed, c, d, name)
        for case in cases
        for dtype in ("bfloat16", "float32")
    }


_SMALL: Mapping[str, Callable[[], dict[str, Compare]]] = {
    "paged_attention": _attention_checks,
    "kv_write": _kv_checks,
    "matmul": _matmul_checks,
    "quantized_matmul": _quantized_checks,
    "grouped_matmul": _grouped_checks,
}


def require(op: Op, implementation: str) -> None:
    """Check that an implementation can run on this device at all, before anything large is made for it.

    Raises:
        Skip: it cannot.
    """
    chosen = next(i for i in op.implementations if i.name == implementation)
    reason = chosen.device_reason(current_device())
    if reason is not None:
        raise Skip(f"{op.name}: {implementation} {reason}")
