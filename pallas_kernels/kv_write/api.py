"""The signature of the KV write, and its dispatch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_layout import NULL_PAGE, Pages
from pallas_kernels.kv_write import native_cpu, reference, xla
from pallas_kernels.op import Implementation, Op
from pallas_kernels.ragged import RaggedBatch, token_positions, token_sequences


def _everything(problem: object) -> str | None:
    del problem
    return None


OP = Op(
    name="kv_write",
    implementations=(
        Implementation("native_cpu", {"run": native_cpu.run}, native_cpu.supports, native_cpu.device_reason),
        Implementation("xla", {"run": xla.run}, _everything),
        Implementation("reference", {"run": reference.run}, _everything),
    ),
    automatic=("native_cpu", "xla"),
)


def slots_of(batch: RaggedBatch, num_tokens: int, page_size: int) -> jax.Array:
    """int32[T]: `page * page_size + offset` of each token row; padding rows point into the null page. Once per step."""
    sequence, position = token_sequences(batch, num_tokens), token_positions(batch, num_tokens)
    rows = jnp.arange(num_tokens, dtype=jnp.int32)
    live = rows < batch.query_start[batch.num_seqs]
    page = batch.block_tables[sequence, position // page_size]
    return jnp.where(live, page * page_size + position % page_size, NULL_PAGE * page_size + rows % page_size)


def kv_write(
    pages: Pages, keys: jax.Array, values: jax.Array, slots: jax.Array, *, implementation: str = "auto"
) -> Pages:
    """Write rows of keys and values into their slots, in place if the caller donates `pages`.

    Args:
        pages: [N, 2, K, P, D], see `kv_layout`; quantized pages get quantized rows and their scales.
        keys, values: [T, K, D], after rope.
        slots: int32[T], from `slots_of`; distinct but for slots of the null page.

    Returns:
        The pages, same shape and dtype.
    """
    run = OP.choose(implementation, str(pages.data.dtype)).functions["run"]
    return run(pages, keys, values, slots)
