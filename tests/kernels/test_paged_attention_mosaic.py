"""The Mosaic GPU kernel of paged attention in JAX's simulator of a GPU: numbers, races, and that both can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.device import H200
from pallas_kernels.kv_layout import Pages
from pallas_kernels.mosaic import SMEM_LIMIT
from pallas_kernels.paged_attention import (
    OP,
    AttentionProblem,
    pallas_mosaic_gpu,
    pallas_mosaic_kernel,
    pallas_mosaic_merge,
    reference,
)
from pallas_kernels.paged_attention.cases import GPU_CASES, TINY_CASES, Case
from pallas_kernels.paged_attention.config import AttentionConfig, heuristic, key, search_space, smem_bytes
from pallas_kernels.paged_attention.mosaic_plan import MERGE_SPLITS
from pallas_kernels.paged_attention.pallas_mosaic_merge import Merge
from pallas_kernels.ragged import RaggedBatch
from tests.kernels.attention_inputs import TOLERANCE, make_inputs, problem_of, sinks_of, widened
from tests.kernels.simulated import SimulationError, simulated

ONE = AttentionConfig(stages=2, compute_warpgroups=1, query_buffers=2, split_tokens=64, max_splits=3)
TWO = AttentionConfig(stages=3, compute_warpgroups=2, query_buffers=1, split_tokens=128, max_splits=2)
WHOLE = AttentionConfig(stages=2, compute_warpgroups=1, query_buffers=1, split_tokens=64, max_splits=1)
BY_NAME = {case.name: case for case in TINY_CASES}
SIMULATED = "mosaic_gpu_simulated"


def kernel_result(case: Case, config: AttentionConfig, q: jax.Array, pages: Pages, batch: RaggedBatch) -> np.ndarray:
    problem = problem_of(case, SIMULATED, q, pages)
    plan = jax.jit(lambda b: pallas_mosaic_gpu.plan(b, case.padded_tokens, problem, config=config))(batch)
    options = {"window": case.window, "soft_cap": case.soft_cap, "sinks": sinks_of(case), "simulate": True}
    out = pallas_mosaic_gpu.run(q, pages, plan, problem, scale=case.head_dim**-0.5, **options)
    assert out.dtype == q.dtype and out.shape == q.shape
    return np.asarray(out, np.float32)


def reference_result(case: Case, q: jax.Array, pages: Pages, batch: RaggedBatch) -> np.ndarray:
    problem = problem_of(case, "reference", q, pages)
    options = {"window": case.window, "soft_cap": case.soft_cap, "sinks": sinks_of(case)}
    call = partial(reference.run, problem=problem, scale=case.head_dim**-0.5, **options)
    return np.asarray(jax.jit(call)(q, pages, batch), np.float32)


def compare(case: Case, dtype: str, kv_dtype: str, config: AttentionConfig) -> None:
    """Poisoned pages through the kernel against clean ones through the reference."""
    q, pages, batch = make_inputs(case, dtype, seed=2, poison=0.0, kv_dtype=kv_dtype)
    expected = reference_result(case, q.astype(jnp.float32), widened(pages), batch)
    _, poisoned, _ = make_inputs(case, dtype, seed=2, poison=float("nan"), kv_dtype=kv_dtype)
    found = kernel_result(case, config, q, poisoned, batch)
    live = sum(case.query_lens)
    np.testing.assert_allclose(found[:live], expected[:live], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not found[live:].any(), "padding rows must be 0"


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda c: c.name)
def test_bfloat16(case: Case) -> None:
    simulated(compare, case, "bfloat16", "bfloat16", ONE)


@pytest.mark.parametrize("name", ["decode", "mixed", "prefill", "prefill, window", "sinks, window", "large group"])
def test_two_warpgroups(name: str) -> None:
    simulated(compare, BY_NAME[name], "bfloat16", "bfloat16", TWO)


@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_unsplit(name: str) -> None:
    simulated(compare, BY_NAME[name], "bfloat16", "bfloat16", WHOLE)


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("name", "config"), [("decode", ONE), ("mixed", TWO), ("sinks, window", ONE), ("soft cap", WHOLE)]
)
def test_quantized_pages(name: str, config: AttentionConfig, kv_dtype: str) -> None:
    simulated(compare, BY_NAME[name], "bfloat16", kv_dtype, config)


@pytest.mark.parametrize("kv_dtype", ["float16", "int8", "float8_e4m3fn"])
def test_float16(kv_dtype: str) -> None:
    simulated(compare, BY_NAME["mixed"], "float16", kv_dtype, ONE)


@pytest.mark.parametrize(
    ("head_dim", "kv_dtype"),
    [
        (80, "bfloat16"),
        (80, "int8"),
        (80, "float8_e4m3fn"),
        (96, "bfloat16"),
        (96, "int8"),
        (128, "bfloat16"),
        (128, "int8"),
        (256, "bfloat16"),
        (256, "int8"),
        (256, "float8_e4m3fn"),
    ],
)
def test_head_dims(head_dim: int, kv_dtype: str) -> None:
    case = Case("head dim", (1, 20), (90, 70), num_heads=2, num_kv_heads=1, head_dim=head_dim)
    simulated(compare, case, "bfloat16", kv_dtype, ONE)


@pytest.mark.parametrize(("head_dim", "kv_dtype"), [(80, "int8"), (256, "float8_e4m3fn")])
def test_head_dims_in_prompts(head_dim: int, kv_dtype: str) -> None:
    """Quantized, on large pages, beside a decode row."""
    case = Case("prompt", (70, 1), (90, 130), num_heads=2, num_kv_heads=1, head_dim=head_dim, page_size=32)
    simulated(compare, case, "bfloat16", kv_dtype, ONE)


@pytest.mark.parametrize("window", [None, 100])
def test_more_splits_than_are_merged_at_a_time(window: int | None) -> None:
    """By the second kernel; with a window whose rows need none of the first splits."""
    config = replace(ONE, max_splits=8)
    case = Case("long", (1, 3, 1), (460, 330, 60), window=window, num_heads=4, num_kv_heads=1)
    assert -(-case.context_lens[0] // config.split_tokens) > pallas_mosaic_merge.AT_A_TIME
    simulated(compare, case, "bfloat16", "bfloat16", config, num_kernels=2)


def merges_of(case: Case, config: AttentionConfig) -> tuple[int, list[int]]:
    """How many merges a step has, and which of its tokens have one."""
    q, pages, batch = make_inputs(case, "bfloat16", seed=1)
    plan = pallas_mosaic_gpu.plan(batch, case.padded_tokens, problem_of(case, SIMULATED, q, pages), config=config)
    return int(plan.merge_count[0]), [token for token, row in enumerate(plan.token_merged) if row >= 0]


def test_only_contexts_of_several_splits_are_merged() -> None:
    case = Case("mixed", (1, 2, 20, 1), (64, 200, 200, 65), num_heads=6, num_kv_heads=1, num_tokens=32, num_seqs=8)
    assert merges_of(case, ONE) == (2 + 1, [1, 2, 23])  # 12 rows, 6 rows; one split, or a prompt: none
    assert merges_of(case, WHOLE) == (0, [])


def rows_with_and_without_mates(config: AttentionConfig, other: AttentionConfig) -> tuple[np.ndarray, np.ndarray]:
    """The first sequence's row among decode rows, and with a prompt in a step of another kind."""
    common = {"num_heads": 4, "num_kv_heads": 1}
    among = Case("among", (1, 1, 1), (200, 5, 64), num_tokens=4, num_seqs=4, max_blocks=16, **common)  # type: ignore[arg-type]
    mixed = Case("mixed", (1, 30, 1), (200, 90, 64), num_tokens=40, num_seqs=4, max_blocks=16, **common)  # type: ignore[arg-type]
    q, pages, batch = make_inputs(among, "bfloat16", seed=3)
    alone = kernel_result(among, config, q, pages, batch)[0]
    q_mixed, pages_mixed, batch_mixed = make_inputs(mixed, "bfloat16", seed=4)
    count = pages.data.shape[0]
    data = jnp.concatenate([pages.data, pages_mixed.data])
    tables = (batch_mixed.block_tables + count).at[0].set(batch.block_tables[0])
    batch_mixed = replace(batch_mixed, block_tables=tables)
    together = kernel_result(mixed, other, q_mixed.at[0].set(q[0]), Pages(data), batch_mixed)[0]
    return alone, together


def test_row_does_not_depend_on_batch_mates() -> None:
    """Nor on how many warpgroups and stages the step's kind has."""
    other = replace(ONE, compute_warpgroups=2, stages=3, query_buffers=1)
    alone, together = simulated(rows_with_and_without_mates, ONE, other, num_kernels=2)
    np.testing.assert_array_equal(alone, together)


# --- that a fault is seen --------------------------------------------------------------------------------------------


class SkippedWait:
    """`plgpu` for a kernel that forgets one wait per block, the `skipped`-th."""

    def __init__(self, original: Any, skipped: int) -> None:
        self._original, self._skipped, self._seen = original, skipped, 0
        self.active = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def barrier_wait(self, barrier: Any) -> None:
        self._seen += self.active
        if not (self.active and self._seen == self._skipped):
            self._original.barrier_wait(barrier)

    def begin(self) -> None:
        self.active, self._seen = True, 0


class NoCommit:
    """`plgpu` for a kernel that forgets to make what it wrote visible to TMA."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def commit_smem(self) -> None:
        pass


class DirtyValues(pallas_mosaic_kernel.Kernel):
    def _clean_values(self, *args: Any) -> None:
        pass


class LastSplitForgotten(Merge):
    def __call__(self, partial: jax.Array, lse: jax.Array, plan: Any) -> jax.Array:
        return super().__call__(partial, lse, replace(plan, merges=plan.merges.at[:, MERGE_SPLITS].add(-1)))


class WithoutWait(pallas_mosaic_kernel.Kernel):
    def _block(self, *args: Any, **kwargs: Any) -> Any:
        words: Any = pallas_mosaic_kernel.plgpu
        words.begin()
        try:
            return super()._block(*args, **kwargs)
        finally:
            words.active = False


class OneRowLate(pallas_mosaic_kernel.Kernel):
    """A mask off by one: every row sees the key after its own."""

    def _block(
        self, refs: Any, task: Any, before: Any, warpgroup: Any, queries: Any, offset: Any, *args: Any, **k: Any
    ):
        return super()._block(refs, task, before, warpgroup, queries, offset + self.group, *args, **k)


@contextmanager
def faulty(fault: str) -> Iterator[None]:
    original = pallas_mosaic_kernel.plgpu
    kernels = {"dirty values": DirtyValues, "mask": OneRowLate, "no wait for keys": WithoutWait}
    kernels["no wait for values"] = WithoutWait
    words = {
        "no commit": NoCommit(original),
        "no wait for keys": SkippedWait(original, 1),
        "no wait for values": SkippedWait(original, 2),
    }
    with (
        mock.patch.object(pallas_mosaic_kernel, "plgpu", words.get(fault, original)),
        mock.patch.object(pallas_mosaic_gpu, "Kernel", kernels.get(fault, pallas_mosaic_kernel.Kernel)),
        mock.patch.object(pallas_mosaic_gpu, "Merge", LastSplitForgotten if fault == "merge" else Merge),
    ):
        yield


def compare_faulty(fault: str, case: Case, config: AttentionConfig) -> None:
    with faulty(fault):
        compare(case, "bfloat16", "bfloat16", config)


@pytest.mark.parametrize(
    ("fault", "name"), [("dirty values", "decode"), ("mask", "prefill"), ("mask", "drafts"), ("merge", "decode")]
)
def test_wrong_numbers_are_seen(fault: str, name: str) -> None:
    with pytest.raises(SimulationError, match="Not equal to tolerance|nan"):
        simulated(compare_faulty, fault, BY_NAME[name], ONE)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no wait for keys", "RACE DETECTED|no threads observed"),
        ("no wait for values", "RACE DETECTED|no threads observed"),
        ("no commit", "RACE DETECTED"),
    ],
)
def test_unordered_accesses_are_seen(fault: str, words: str) -> None:
    with pytest.raises(SimulationError, match=words):
        simulated(compare_faulty, fault, BY_NAME["decode, one head per group"], ONE, timeout_s=60)


# --- what needs no simulator -----------------------------------------------------------------------------------------


PROBLEM = AttentionProblem(32, 8, 128, 16, "bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float32", "kv_dtype": "float32"}, "not float32"),
        ({"kv_dtype": "float16"}, "must be the same"),
        ({"head_dim": 24}, "head dim 24 is none of"),
        ({"page_size": 8}, "page size 8 is none of"),
        ({"num_heads": 33}, "not a multiple of"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    assert pallas_mosaic_gpu.supports(PROBLEM) is None
    assert words in (pallas_mosaic_gpu.supports(replace(PROBLEM, **changes)) or "")


@pytest.mark.parametrize("compute", [1, 2])
@pytest.mark.parametrize("quantized", [False, True])
def test_registers_are_there(quantized: bool, compute: int) -> None:
    """A warpgroup that asks for more than the others gave up would wait forever, which no simulator sees."""
    table = pallas_mosaic_kernel.REGISTERS_QUANTIZED if quantized else pallas_mosaic_kernel.REGISTERS_16_BIT
    registers = table[compute]
    warpgroups = compute + 1 + quantized
    start = pallas_mosaic_kernel.registers_at_start(warpgroups)
    assert registers[0] >= start >= max(registers[1:])  # compute takes, others give
    assert compute * registers[0] + sum(registers[1:]) <= warpgroups * start


def test_ladder() -> None:
    assert [i.name for i in OP.implementations if i.refuses(PROBLEM, H200) is None][0] == "mosaic_gpu"
    assert OP.automatic == ("mosaic_gpu", "native_cpu", "xla")


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_configurations(case: Case, kv_dtype: str) -> None:
    """All fit, and those of one problem give the same bits whatever the kind of step is."""
    problem = AttentionProblem(case.num_heads, case.num_kv_heads, case.head_dim, case.page_size, "bfloat16", kv_dtype)
    few, many = heuristic(problem, 1), heuristic(problem, 8192)
    assert key(problem, 1) != key(problem, 8192)
    for config in (few, many, *search_space(problem, 1), *search_space(problem, 8192)):
        assert smem_bytes(config, problem) <= SMEM_LIMIT
        bits = (config.kv_block, config.split_tokens, config.max_splits)
        assert bits == (few.kv_block, few.split_tokens, few.max_splits)


def test_bad_configurations_are_refused() -> None:
    for changes in ({"kv_block": 32}, {"split_tokens": 100}, {"compute_warpgroups": 3}, {"stages": 0}):
        with pytest.raises(ValueError):
            replace(ONE, **changes)
