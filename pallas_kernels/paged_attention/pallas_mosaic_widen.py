"""Quantized keys and values in the paged attention kernel: what its widener does with one block of them.

Stored numbers become the queries' dtype, in which they are exact; scales stay apart, and meet scores and weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic import Hopper
from pallas_kernels.paged_attention.config import AttentionConfig
from pallas_kernels.paged_attention.pallas_mosaic_refs import Refs, slot_of
from pallas_kernels.paged_attention.problem import AttentionProblem

COLUMNS = 128  # of narrow keys and values that are widened at a time


class _Way(NamedTuple):
    """The way of keys, or of values, from the loader's stages to the tensor cores."""

    narrow: Any
    narrow_scale: Any
    narrow_full: Any
    narrow_free: Any
    wide: Any
    scale: Any
    full: Any
    free: Any


@dataclass(frozen=True)
class Widener:
    """The static side."""

    problem: AttentionProblem
    config: AttentionConfig
    ops: Hopper

    def block(self, refs: Refs, number: jax.Array, known: jax.Array) -> None:
        """One block of keys and values.

        Args:
            refs: of the kernel.
            number: how many blocks went before, over all tasks.
            known: keys of the block that the context has; what lies behind them may be anything.
        """
        keys = _Way(
            refs.narrow_k,
            refs.narrow_k_scale,
            refs.narrow_k_full,
            refs.narrow_k_free,
            refs.k_smem,
            refs.k_scale,
            refs.k_full,
            refs.k_free,
        )
        values = _Way(
            refs.narrow_v,
            refs.narrow_v_scale,
            refs.narrow_v_full,
            refs.narrow_v_free,
            refs.v_smem,
            refs.v_scale,
            refs.v_full,
            refs.v_free,
        )
        for way, limit in ((keys, None), (values, known)):
            self._pass(way, number, limit)

    def _pass(self, way: _Way, number: jax.Array, known: jax.Array | None) -> None:
        """Widen one of both; those beyond `known` become 0, with scale 0."""
        slot, wide_slot, dim = slot_of(number, self.config.stages), slot_of(number, 1), self.problem.head_dim
        plgpu.barrier_wait(way.narrow_full.at[slot])

        @pl.when(number >= 1)
        def _wait() -> None:
            plgpu.barrier_wait(way.free.at[wide_slot])

        for column in range(0, dim, COLUMNS):
            part = pl.ds(column, min(COLUMNS, dim))
            numbers = self.ops.load_narrow(way.narrow.at[slot, :, part], self.problem.dtype)
            if known is not None:
                row = self.ops.iota(numbers.shape, 0)
                numbers = jnp.where(row < known, numbers, jnp.zeros(numbers.shape, numbers.dtype))
            way.wide[0, :, part] = numbers
        self._scales(way, slot, known)
        plgpu.commit_smem()
        plgpu.barrier_arrive(way.narrow_free.at[slot])
        plgpu.barrier_arrive(way.full.at[wide_slot])

    def _scales(self, way: _Way, slot: jax.Array, known: jax.Array | None) -> None:
        """From a line for each page to one for the block."""
        size, layout = self.problem.page_size, plgpu.Layout.WGMMA.reduce(0)
        for page in range(self.config.kv_block // size):
            factors = self.ops.load(way.narrow_scale.at[slot, page, pl.ds(0, size)], layout)
            if known is not None:
                key = self.ops.iota((size,), 0, layout) + page * size
                factors = jnp.where(key < known, factors, 0.0)
            way.scale[0, pl.ds(page * size, size)] = factors
