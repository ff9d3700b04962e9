"""Paged attention for Hopper in Pallas Mosaic GPU: one kernel for decode rows, drafts and prompts.

The online softmax of FlashAttention (Dao 2023, arXiv 2307.08691) with the specialised warpgroups of FlashAttention-3
(Shah et al. 2024, arXiv 2407.08608) and the split contexts of Flash-Decoding (Dao et al. 2023), over pages. A block of
threads takes items (see `mosaic_plan`) by turns; its warpgroups have roles and meet at barriers only:

    loader   --TMA, page by page-->  keys, values  --wgmma-->  compute (1 or 2 warpgroups of 64 rows)  --TMA--> results
    loader   --TMA-->  narrow keys, values  --widener-->  keys, values  --…            (quantized pages)

The loader runs ahead, over the ends of items too, as far as the stages reach. Rows of one kv head are packed (token,
head of the group), so one query token of a large group fills a tile as well as many tokens of a small one.

What may hold anything (tails of last pages, with NaN) is kept out twice: its scores are masked, and its values are set
to 0, because 0 * NaN would poison a product of matrices. Table entries beyond the context are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_layout import QUANTIZED, Pages
from pallas_kernels.mosaic import LOG2E, MASKED, ROWS_OF_TILE, Hopper, compiler_params, i32, mma_transforms, swizzle_of
from pallas_kernels.paged_attention import mosaic_plan as columns
from pallas_kernels.paged_attention.config import WARPGROUP_ROWS, AttentionConfig, columns_at_a_time
from pallas_kernels.paged_attention.mosaic_plan import Plan
from pallas_kernels.paged_attention.pallas_mosaic_merge import PIECES, stored_columns
from pallas_kernels.paged_attention.pallas_mosaic_refs import Refs, Task, eights, slot_of
from pallas_kernels.paged_attention.pallas_mosaic_widen import Widener
from pallas_kernels.paged_attention.problem import AttentionProblem

SCALE_LINE = 32  # float32 of 128 bytes
# Registers per thread of (compute, widener, loader), by the number of compute warpgroups. A block starts with
# `registers_at_start` for each thread, and what some take others must have given up: a sum beyond that waits forever.
REGISTERS_QUANTIZED = {1: (240, 160, 40), 2: (184, 104, 40)}
REGISTERS_16_BIT = {1: (240, 0, 40), 2: (232, 0, 40)}
REGISTER_FILE = 65536
WARPGROUP_THREADS = 128


def registers_at_start(num_warpgroups: int) -> int:
    """Registers per thread that the assembler gives a block that fills a core."""
    return min(240, REGISTER_FILE // (WARPGROUP_THREADS * num_warpgroups) // 8 * 8)


@dataclass(frozen=True)
class Kernel:
    """The kernel's static side; methods are what its warpgroups do."""

    problem: AttentionProblem
    config: AttentionConfig
    scale: float
    window: int | None
    soft_cap: float | None
    has_sinks: bool
    splits: bool
    num_ctas: int
    ops: Hopper

    @property
    def is_quantized(self) -> bool:
        return self.problem.kv_dtype in QUANTIZED

    @property
    def group(self) -> int:
        return self.problem.num_heads // self.problem.num_kv_heads

    @property
    def block_pages(self) -> int:
        return self.config.kv_block // self.problem.page_size

    @property
    def wide_stages(self) -> int:
        """Slots of keys and values that wgmma reads."""
        return 1 if self.is_quantized else self.config.stages

    @property
    def step_keys(self) -> int:
        """Keys whose scores are in registers at a time: half a block beside the sums of a wide head."""
        return self.config.kv_block if self.problem.head_dim <= 128 else self.config.kv_block // 2

    @property
    def num_warpgroups(self) -> int:
        return self.config.compute_warpgroups + (2 if self.is_quantized else 1)

    @property
    def registers(self) -> tuple[int, int, int]:
        return (REGISTERS_QUANTIZED if self.is_quantized else REGISTERS_16_BIT)[self.config.compute_warpgroups]

    # --- what all roles share -----------------------------------------------------------------------------------

    def task(self, refs: Refs, turn: jax.Array) -> Task:
        """The task of this block of threads' turn. Heads run fastest: neighbours read neighbouring memory."""
        linear = turn * self.num_ctas + lax.axis_index("cta")
        item = lax.div(linear, i32(self.problem.num_kv_heads))
        position = refs.items[item, columns.POSITION]
        first = position + lax.div(refs.items[item, columns.OFFSET], i32(self.group))
        low, high = refs.items[item, columns.LOW], refs.items[item, columns.HIGH]
        if self.window is not None:
            low = jnp.maximum(low, lax.div(jnp.maximum(first - (self.window - 1), 0), i32(self.config.kv_block)))
        return Task(
            item=item,
            head=lax.rem(linear, i32(self.problem.num_kv_heads)),
            position=position,
            context=refs.items[item, columns.CONTEXT],
            low=low,
            high=jnp.maximum(low, high),  # a split that lies before the window is empty
        )

    def for_tasks(self, refs: Refs, run: Callable[[jax.Array, Task, jax.Array], None]) -> jax.Array:
        """Call `run(turn, task, blocks before it)` for each task of this block of threads; returns all blocks."""
        total = refs.count[0] * self.problem.num_kv_heads
        turns = lax.div(total - lax.axis_index("cta") + (self.num_ctas - 1), i32(self.num_ctas))

        def one(turn: jax.Array, before: jax.Array) -> jax.Array:
            task = self.task(refs, turn)
            run(turn, task, before)
            return before + task.high - task.low

        return lax.fori_loop(i32(0), turns, one, i32(0))

    # --- loader -------------------------------------------------------------------------------------------------

    def load(self, refs: Refs) -> None:
        """Copy pages into the stages, keys and values of a block after each other."""
        stages, size = self.config.stages, self.problem.page_size
        if self.is_quantized:
            keys, values = refs.narrow_k, refs.narrow_v
            k_full, v_full, k_free, v_free = (
                refs.narrow_k_full,
                refs.narrow_v_full,
                refs.narrow_k_free,
                refs.narrow_v_free,
            )
        else:
            keys, values = refs.k_smem, refs.v_smem
            k_full, v_full, k_free, v_free = refs.k_full, refs.v_full, refs.k_free, refs.v_free

        def run(turn: jax.Array, task: Task, before: jax.Array) -> None:
            del turn
            sequence = refs.items[task.item, columns.SEQUENCE]
            last_page = lax.div(task.context - 1, i32(size))

            def pages_of(block: jax.Array) -> tuple[jax.Array, ...]:
                first = block * self.block_pages
                return tuple(refs.tables[sequence, jnp.minimum(first + j, last_page)] for j in range(self.block_pages))

            def one(block: jax.Array, pages: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                following = pages_of(block + 1)  # on its way while this block waits for its slots
                number = before + block - task.low
                slot = slot_of(number, stages)
                for which, (smem, scale_smem, full, free) in enumerate(
                    (
                        (keys, refs.narrow_k_scale, k_full, k_free),
                        (values, refs.narrow_v_scale, v_full, v_free),
                    )
                ):

                    @pl.when(number >= stages)
                    def _wait(free: Any = free) -> None:
                        plgpu.barrier_wait(free.at[slot])

                    for j, page in enumerate(pages):
                        tile = (page * 2 + which) * self.problem.num_kv_heads + task.head
                        part = pl.ds(j * size, size)
                        plgpu.copy_gmem_to_smem(refs.pages.at[tile], smem.at[slot, part], full.at[slot])
                        if self.is_quantized:
                            line = scale_smem.at[slot, j, pl.ds(0, size)]
                            plgpu.copy_gmem_to_smem(refs.scales.at[tile], line, full.at[slot])
                return following

            lax.fori_loop(task.low, task.high, one, pages_of(task.low))

        total = self.for_tasks(refs, run)
        self._drain(total, stages, k_free, v_free)

    def _drain(self, total: jax.Array, stages: int, *barriers: Any) -> None:
        """See the last completions of barriers that the loop would have waited for next."""

        @pl.loop(jnp.maximum(total - stages, 0), total)
        def _(number: jax.Array) -> None:
            slot = slot_of(number, stages)
            for barrier in barriers:
                plgpu.barrier_wait(barrier.at[slot])

    # --- widener ------------------------------------------------------------------------------------------------

    def widen(self, refs: Refs) -> None:
        """Turn quantized keys and values into queries' dtype, block by block."""
        widener = Widener(self.problem, self.config, self.ops)

        def run(turn: jax.Array, task: Task, before: jax.Array) -> None:
            del turn

            def one(block: jax.Array, carry: None) -> None:
                widener.block(refs, before + block - task.low, task.context - block * self.config.kv_block)
                return carry

            lax.fori_loop(task.low, task.high, one, None)

        total = self.for_tasks(refs, run)
        self._drain(total, 1, refs.k_free, refs.v_free)

    # --- compute ------------------------------------------------------------------------------------------------

    def attend(self, refs: Refs, warpgroup: jax.Array) -> None:
        """Softmax and products of 64 rows per task."""
        buffers = self.config.query_buffers
        num_turns = lax.div(
            refs.count[0] * self.problem.num_kv_heads - lax.axis_index("cta") + (self.num_ctas - 1), i32(self.num_ctas)
        )

        def load_queries(turn: jax.Array) -> None:
            task = self.task(refs, turn)
            slot = warpgroup * buffers + lax.rem(turn, i32(buffers))
            row = refs.items[task.item, columns.ROW] + warpgroup * WARPGROUP_ROWS
            part = eights(row, WARPGROUP_ROWS)
            plgpu.copy_gmem_to_smem(refs.q.at[part, task.head], refs.q_smem.at[slot], refs.q_full.at[slot])

        def run(turn: jax.Array, task: Task, before: jax.Array) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # results of the task before lie in the buffers
            if buffers == 1:
                load_queries(turn)
            else:

                @pl.when(turn + 1 < num_turns)
                def _ahead() -> None:
                    load_queries(turn + 1)

            slot = warpgroup * buffers + lax.rem(turn, i32(buffers))
            plgpu.barrier_wait(refs.q_full.at[slot])
            rows = refs.items[task.item, columns.ROWS] - warpgroup * WARPGROUP_ROWS

            @pl.when((rows > 0) & (task.high > task.low))
            def _work() -> None:
                self._tile(refs, task, before, warpgroup, refs.q_smem.at[slot], rows)

            if self.config.compute_warpgroups > 1:

                @pl.when((rows <= 0) & (task.high > task.low))
                def _pass() -> None:
                    self._skip(refs, task, before)

        if buffers > 1:

            @pl.when(num_turns > 0)
            def _first() -> None:
                load_queries(i32(0))

        self.for_tasks(refs, run)
        plgpu.wait_smem_to_gmem(0)

    def _skip(self, refs: Refs, task: Task, before: jax.Array) -> None:
        """Let the blocks of a tile pass that leaves this warpgroup without rows."""

        @pl.loop(task.low, task.high)
        def _(block: jax.Array) -> None:
            slot = slot_of(before + block - task.low, self.wide_stages)
            plgpu.barrier_wait(refs.k_full.at[slot])
            plgpu.barrier_arrive(refs.k_free.at[slot])
            plgpu.barrier_wait(refs.v_full.at[slot])
            if refs.v_clean is not None:

                @pl.when((block + 1) * self.config.kv_block > task.context)
                def _meet() -> None:
                    plgpu.barrier_arrive(refs.v_clean)
                    plgpu.barrier_wait(refs.v_clean)

            plgpu.barrier_arrive(refs.v_free.at[slot])

    def _tile(
        self, refs: Refs, task: Task, before: jax.Array, warpgroup: jax.Array, queries: Any, rows: jax.Array
    ) -> None:
        """All blocks of a task for this warpgroup's rows, and their results."""
        ops, dim = self.ops, self.problem.head_dim
        offset = refs.items[task.item, columns.OFFSET] + warpgroup * WARPGROUP_ROWS
        position = task.position
        last = refs.items[task.item, columns.LAST]
        low_position = position + lax.div(offset, i32(self.group))
        high_position = jnp.minimum(position + lax.div(offset + (WARPGROUP_ROWS - 1), i32(self.group)), last)

        top, total = self._row_of(MASKED), self._row_of(0.0)
        if self.has_sinks:
            # A sink is a score that has been seen, once: by the last split.
            period = lax.rem(offset, i32(self.group))
            sinks = ops.load(
                refs.sinks.at[task.head, pl.ds(period, WARPGROUP_ROWS)], plgpu.Layout.WGMMA.reduce(1), optimized=False
            )
            final = (refs.items[task.item, columns.FINAL]).astype(jnp.float32)
            top = jnp.maximum(sinks * LOG2E * final + (1.0 - final) * MASKED, top)
            total = total + final
        acc = ops.cast(jnp.full((WARPGROUP_ROWS, dim), 0.0, jnp.float32), plgpu.Layout.WGMMA)

        block_size = self.config.kv_block
        full_end = jnp.clip(lax.div(low_position + 1, i32(block_size)), task.low, task.high)
        carry = (acc, top, total)
        step = partial(self._block, refs, task, before, warpgroup, queries, offset)
        edge_end = task.low
        if self.window is not None:
            # Up to here blocks hold keys that the last row does not see any more.
            edge = lax.div(jnp.maximum(high_position - self.window + block_size, 0), i32(block_size))
            edge_end = jnp.clip(edge, task.low, task.high)
            full_end = jnp.maximum(edge_end, full_end)
            carry = lax.fori_loop(task.low, edge_end, partial(step, masked=True), carry)
        carry = lax.fori_loop(edge_end, full_end, partial(step, masked=False), carry)
        acc, top, total = lax.fori_loop(full_end, task.high, partial(step, masked=True), carry)
        result = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
        if not self.splits:
            self._write_final(refs, task, warpgroup, queries, rows, result)
            return
        is_partial = refs.items[task.item, columns.PARTIAL] >= 0

        @pl.when(is_partial)
        def _partial() -> None:
            self._write_partial(refs, task, rows, result, top + jnp.log2(total))

        @pl.when(jnp.logical_not(is_partial))
        def _final() -> None:
            self._write_final(refs, task, warpgroup, queries, rows, result)

    def _row_of(self, value: float) -> jax.Array:
        """float32[64], one per row."""
        return self.ops.cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

    def _block(
        self,
        refs: Refs,
        task: Task,
        before: jax.Array,
        warpgroup: jax.Array,
        queries: Any,
        offset: jax.Array,
        block: jax.Array,
        carry: tuple,
        *,
        masked: bool,
    ) -> tuple:
        """One block of keys and values: scores, online softmax, weighted values."""
        slot = slot_of(before + block - task.low, self.wide_stages)
        plgpu.barrier_wait(refs.k_full.at[slot])
        for first in range(0, self.config.kv_block, self.step_keys):
            keys = pl.ds(first, self.step_keys)
            acc, top, total = carry
            scores = self._scores(refs, queries, slot, keys)
            if first + self.step_keys == self.config.kv_block:
                plgpu.barrier_arrive(refs.k_free.at[slot])
            factor = 1.0 if self.is_quantized else self.scale * LOG2E
            if self.soft_cap is not None:
                scores, factor = self._capped(scores, factor), 1.0
            if masked:
                # Scaled first: a fused multiply-add of a masked score would leave its rounding error, which is huge.
                visible = self._visible(task, offset, block * self.config.kv_block + first)
                scores, factor = jnp.where(visible, scores * factor, MASKED), 1.0
            new_top = jnp.maximum(top, scores.max(axis=1) * factor)
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_top, scores.shape, [0]))
            total = total * shrink + weights.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            if first == 0:
                plgpu.barrier_wait(refs.v_full.at[slot])
                if masked and not self.is_quantized:
                    self._clean_values(refs, task, warpgroup, block, slot)
            if self.is_quantized:
                factors = self.ops.load(refs.v_scale.at[slot, keys], plgpu.Layout.WGMMA.reduce(0))
                weights = weights * lax.broadcast_in_dim(factors, weights.shape, [1])
            acc = self.ops.add_dot(acc, weights.astype(self.problem.dtype), refs.v_smem.at[slot, keys])
            carry = acc, new_top, total
        plgpu.barrier_arrive(refs.v_free.at[slot])
        return carry

    def _scores(self, refs: Refs, queries: Any, slot: jax.Array, keys: Any) -> jax.Array:
        """float32[64, keys]: products, unscaled; of quantized keys scaled, base 2."""
        shape = (WARPGROUP_ROWS, self.step_keys)
        scores = self.ops.dot(queries, refs.k_smem.at[slot, keys].transpose((1, 0)), shape)
        if not self.is_quantized:
            return scores
        factors = self.ops.load(refs.k_scale.at[slot, keys], plgpu.Layout.WGMMA.reduce(0))
        return scores * lax.broadcast_in_dim(factors * (self.scale * LOG2E), shape, [1])

    def _capped(self, scores: jax.Array, factor: float) -> jax.Array:
        """`cap * tanh(score / cap)`, base 2.

        By exp2, whose error is in the last bits: the hardware's tanh is good to 11 bits, and the cap multiplies that.
        """
        assert self.soft_cap is not None
        grown = jnp.exp2(scores * (factor * 2.0 / self.soft_cap))  # e^(2 score / cap)
        return (1.0 - 2.0 / (grown + 1.0)) * (self.soft_cap * LOG2E)

    def _visible(self, task: Task, offset: jax.Array, first_key: jax.Array) -> jax.Array:
        """bool[64, keys]: what each row may see."""
        shape = (WARPGROUP_ROWS, self.step_keys)
        key = self.ops.iota(shape, 1) + first_key
        row = self.ops.iota(shape, 0) + offset
        position = task.position + lax.div(row, jnp.full(shape, self.group, jnp.int32))
        visible = key <= position
        if self.window is not None:
            visible &= key > position - self.window
        return visible

    def _clean_values(self, refs: Refs, task: Task, warpgroup: jax.Array, block: jax.Array, slot: jax.Array) -> None:
        """Zero the values beyond the context, in the one block that has such."""
        width = columns_at_a_time(self.problem.head_dim)
        shape = (self.config.kv_block, width)
        known = task.context - block * self.config.kv_block

        @pl.when(known < self.config.kv_block)
        def _() -> None:
            def clean() -> None:
                for column in range(0, self.problem.head_dim, width):
                    part = pl.ds(column, width)
                    values = self.ops.load(refs.v_smem.at[slot, :, part], plgpu.Layout.WGMMA)
                    values = jnp.where(self.ops.iota(shape, 0) < known, values, jnp.zeros(shape, values.dtype))
                    refs.v_smem[slot, :, part] = values
                plgpu.commit_smem()

            if refs.v_clean is None:
                clean()
            else:

                @pl.when(warpgroup == 0)
                def _first() -> None:
                    clean()

                plgpu.barrier_arrive(refs.v_clean)
                plgpu.barrier_wait(refs.v_clean)

    def _write_final(
        self, refs: Refs, task: Task, warpgroup: jax.Array, queries: Any, rows: jax.Array, result: jax.Array
    ) -> None:
        queries[...] = result.astype(self.problem.dtype)
        plgpu.commit_smem()
        row = refs.items[task.item, columns.ROW] + warpgroup * WARPGROUP_ROWS

        def copy(first: int, size: int) -> None:
            plgpu.copy_smem_to_gmem(queries.at[pl.ds(first, size)], refs.out.at[eights(row + first, size), task.head])

        self._copy_rows(rows, copy)

    def _write_partial(self, refs: Refs, task: Task, rows: jax.Array, result: jax.Array, log: jax.Array) -> None:
        row = refs.items[task.item, columns.PARTIAL]
        refs.lse_smem[...] = lax.broadcast_in_dim(log, (WARPGROUP_ROWS, PIECES), [0])
        width = columns_at_a_time(self.problem.head_dim)
        for column in range(0, self.problem.head_dim, width):
            if column:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            refs.partial_smem[...] = result[:, column : column + width]
            plgpu.commit_smem()

            def copy(first: int, size: int, column: int = column) -> None:
                source, target = pl.ds(first, size), eights(row + first, size)
                if column == 0:
                    plgpu.copy_smem_to_gmem(refs.lse_smem.at[source], refs.lse.at[task.head, target])
                plgpu.copy_smem_to_gmem(
                    refs.partial_smem.at[source], refs.partial.at[task.head, target, pl.ds(column, width)]
                )

            self._copy_rows(rows, copy)

    def _copy_rows(self, rows: jax.Array, copy: Callable[[int, int], None]) -> None:
        """`copy(first, size)` of all 64 rows, or of the eights that have rows: what follows belongs to other tiles."""

        @pl.when(rows > WARPGROUP_ROWS - ROWS_OF_TILE)
        def _whole() -> None:
            copy(0, WARPGROUP_ROWS)

        for first in range(0, WARPGROUP_ROWS - ROWS_OF_TILE, ROWS_OF_TILE):

            @pl.when((rows > first) & (rows <= WARPGROUP_ROWS - ROWS_OF_TILE))
            def _eight(first: int = first) -> None:
                copy(first, ROWS_OF_TILE)

    # --- the whole ----------------------------------------------------------------------------------------------

    def body(self, refs: Refs) -> None:
        """What each warpgroup does."""
        compute, widener, loader = self.registers
        warpgroup = lax.axis_index("warpgroup")
        computing = self.config.compute_warpgroups

        @pl.when(warpgroup < computing)
        def _compute() -> None:
            plgpu.set_max_registers(compute, action="increase")
            self.attend(refs, warpgroup)

        @pl.when(warpgroup == computing)
        def _load() -> None:
            plgpu.set_max_registers(loader, action="decrease")
            self.load(refs)

        if self.is_quantized:

            @pl.when(warpgroup == computing + 1)
            def _widen() -> None:
                plgpu.set_max_registers(widener, action="decrease")
                self.widen(refs)

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers by name."""
        config, dim, dtype = self.config, self.problem.head_dim, self.problem.dtype
        stages, wide, block = config.stages, self.wide_stages, config.kv_block
        computing = config.compute_warpgroups
        query_slots = computing * config.query_buffers
        transforms = mma_transforms(dim, dtype)
        arrivals = 1 if self.is_quantized else self.block_pages
        kinds: dict[str, Any] = {
            "q_smem": plgpu.SMEM((query_slots, WARPGROUP_ROWS, dim), dtype, transforms=transforms),
            "k_smem": plgpu.SMEM((wide, block, dim), dtype, transforms=transforms),
            # A product sums over as many keys at a time as its swizzle has columns.
            "v_smem": plgpu.SMEM(
                (wide, block, dim),
                dtype,
                transforms=mma_transforms(min(dim, self.step_keys), dtype) if self.step_keys < block else transforms,
            ),
            "q_full": plgpu.Barrier(num_barriers=query_slots),
            "k_full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=wide),
            "v_full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=wide),
            "k_free": plgpu.Barrier(num_arrivals=computing, num_barriers=wide),
            "v_free": plgpu.Barrier(num_arrivals=computing, num_barriers=wide),
        }
        if computing > 1 and not self.is_quantized:
            # Both arrive: the first could otherwise complete it twice before the second looks.
            kinds["v_clean"] = plgpu.Barrier(num_arrivals=2)
        if self.splits:
            width = columns_at_a_time(dim)
            kinds["partial_smem"] = plgpu.SMEM(
                (WARPGROUP_ROWS, width), jnp.float32, transforms=mma_transforms(width, jnp.float32)
            )
            kinds["lse_smem"] = plgpu.SMEM(
                (WARPGROUP_ROWS, PIECES), jnp.float32, transforms=mma_transforms(PIECES, jnp.float32)
            )
        if self.is_quantized:
            # Threads read narrow pages, not tensor cores: rows that no swizzle fits lie one after another.
            narrow = mma_transforms(dim, self.problem.kv_dtype) if swizzle_of(dim, self.problem.kv_dtype) else ()
            for name in ("k", "v"):
                kinds |= {
                    f"narrow_{name}": plgpu.SMEM((stages, block, dim), self.problem.kv_dtype, transforms=narrow),
                    # Each page's scales in a line of their own: TMA writes from multiples of 128 bytes on.
                    f"narrow_{name}_scale": plgpu.SMEM((stages, self.block_pages, SCALE_LINE), jnp.float32),
                    f"{name}_scale": plgpu.SMEM((1, block), jnp.float32),
                    f"narrow_{name}_full": plgpu.Barrier(num_arrivals=2 * self.block_pages, num_barriers=stages),
                    f"narrow_{name}_free": plgpu.Barrier(num_barriers=stages),
                }
        return kinds

    def __call__(self, q: jax.Array, pages: Pages, plan: Plan, sinks: jax.Array | None) -> tuple[jax.Array, ...]:
        """Run on packed queries.

        Args:
            q: [R, K, D].
            sinks: [H] or None.

        Returns:
            [R, K, D] final results, and if contexts are split float32[K, X, D'] partial ones and float32[K, X, 8] the
            logarithms (base 2) of their sums. Rows that no item has are not written.
        """
        data = pages.data
        inputs = {
            "q": q,
            "pages": data.reshape(-1, *data.shape[3:]),
            "items": plan.items,
            "count": plan.count,
            "tables": plan.tables,
        }
        if pages.scales is not None:
            inputs["scales"] = pages.scales.reshape(-1, pages.scales.shape[3])
        if sinks is not None:
            # Rows of a tile go through the heads of a group again and again, from any of them on.
            head = jnp.arange(self.group + WARPGROUP_ROWS) % self.group
            inputs["sinks"] = jnp.maximum(sinks.astype(jnp.float32), MASKED).reshape(-1, self.group)[:, head]
        outputs = {"out": jax.ShapeDtypeStruct(q.shape, q.dtype)}
        if self.splits:
            kv_heads, dim = q.shape[1:]
            shape = (kv_heads, plan.partial_rows)
            outputs["partial"] = jax.ShapeDtypeStruct((*shape, stored_columns(dim)), jnp.float32)
            outputs["lse"] = jax.ShapeDtypeStruct((*shape, PIECES), jnp.float32)
        scratch = self.scratch()
        names = (*inputs, *outputs, *scratch)

        def kernel(*refs: Any) -> None:
            self.body(Refs(**dict(zip(names, refs, strict=True))))

        return tuple(
            plgpu.kernel(
                kernel,
                out_type=list(outputs.values()),
                grid=(self.num_ctas,),
                grid_names=("cta",),
                num_threads=self.num_warpgroups,
                thread_name="warpgroup",
                scratch_types=list(scratch.values()),
                compiler_params=compiler_params(),
                interpret=self.ops.interpret,
            )(*inputs.values())
        )
