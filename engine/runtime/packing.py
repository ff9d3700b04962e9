"""`StepInputs`: all that the host tells the device in one step, as one int32 array.

One transfer per step instead of a dozen; on a GPU one buffer whose address a command buffer can keep. The layout
depends on the bucket alone, so the device unpacks it with static slices.

    num_seqs | tokens[T] | query_start[S+1] | context_lens[S] | rows[S] | sampling[S, W] | updates[U, 3] | num_drafts[S]

Token -1 means: the token that this row's sequence sampled last, which only the device knows yet; -2 a draft that the
device made itself. A context length below 0 means that the device alone knows how many tokens the sequence has:
-1 - d is as many as it has and d drafts.
`updates` are new entries of the block tables, (row, index, block); row R, one past the last, is where padding goes.
`num_drafts` is there in verify buckets only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from engine.runtime.buckets import Bucket
from engine.runtime.device_state import RowTokens
from engine.runtime.sampling.inputs import WIDTH, Column, with_drafts
from engine.scheduling.plan import FROM_DRAFT, ScheduledSequence, StepPlan
from pallas_kernels.ragged import RaggedBatch, token_positions, token_sequences

FROM_DEVICE = -1
UPDATE_WIDTH = 3


@dataclass(frozen=True)
class StepLayout:
    """Where each field lies in the packed array of one bucket.

    Attributes:
        bucket: T tokens, S sequences.
        page_size: P.
        num_rows: R, rows of the device state that sequences can own.
    """

    bucket: Bucket
    page_size: int
    num_rows: int

    @property
    def num_updates(self) -> int:
        """U: most new blocks that T tokens of S sequences can open, prefix hits aside."""
        return self.bucket.num_tokens // self.page_size + self.bucket.num_seqs

    @cached_property
    def fields(self) -> dict[str, tuple[slice, tuple[int, ...]]]:
        """name -> (place, shape)."""
        tokens, seqs = self.bucket.num_tokens, self.bucket.num_seqs
        shapes = {
            "num_seqs": (1,),
            "tokens": (tokens,),
            "query_start": (seqs + 1,),
            "context_lens": (seqs,),
            "rows": (seqs,),
            "sampling": (seqs, WIDTH),
            "updates": (self.num_updates, UPDATE_WIDTH),
        }
        if self.bucket.num_logits > 1:
            shapes["num_drafts"] = (seqs,)
        offset, fields = 0, {}
        for name, shape in shapes.items():
            stop = offset + math.prod(shape)
            fields[name] = (slice(offset, stop), shape)
            offset = stop
        return fields

    @cached_property
    def size(self) -> int:
        """Length of the packed array, in int32 words."""
        return max(place.stop for place, _ in self.fields.values())

    def views(self, packed: np.ndarray) -> dict[str, np.ndarray]:
        """Writable views of each field."""
        return {name: packed[place].reshape(shape) for name, (place, shape) in self.fields.items()}

    def unpack(self, packed: jax.Array) -> dict[str, jax.Array]:
        """The same on the device; call inside jit."""
        return {name: packed[place].reshape(shape) for name, (place, shape) in self.fields.items()}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRows:
    """What the forward pass derives from the packed fields.

    Attributes:
        rows: int32[S], of the device state; the padding row for padding.
        token_ids, positions: int32[T].
        logit_rows: int32[S * L], token rows with logits, sequence by sequence; L = `Bucket.num_logits`.
        sampling: int32[S, W] of one row of logits each, or `with_drafts` of more.
        batch: lengths, offsets and block tables.
    """

    rows: jax.Array
    token_ids: jax.Array
    positions: jax.Array
    logit_rows: jax.Array
    sampling: jax.Array
    batch: RaggedBatch


def context_lengths(fields: dict[str, jax.Array], known: RowTokens) -> jax.Array:
    """int32[S], tokens of each sequence at the end of the step, its drafts included."""
    context = fields["context_lens"]
    return jnp.where(context < 0, known.num_known[fields["rows"]] - 1 - context, context)


def updated_tables(fields: dict[str, jax.Array], block_tables: jax.Array) -> jax.Array:
    """The block tables with a step's new entries."""
    updates = fields["updates"]
    return block_tables.at[updates[:, 0], updates[:, 1]].set(updates[:, 2], mode="promise_in_bounds")


def token_rows(
    fields: dict[str, jax.Array],
    block_tables: jax.Array,
    known: RowTokens,
    num_logits: int,
    draft_ids: jax.Array | None = None,
) -> TokenRows:
    """Positions, token ids, the ragged batch and what sampling needs of one step.

    Args:
        fields: from `StepLayout.unpack`.
        block_tables: int32[R+1, B], this step's updates included.
        known: what each row knows of its sequence.
        num_logits: rows of logits of each sequence.
        draft_ids: int32[S, K], what the device guessed itself.
    """
    rows, num_tokens, context = fields["rows"], fields["tokens"].shape[0], context_lengths(fields, known)
    batch = RaggedBatch(fields["query_start"], context, block_tables[rows], fields["num_seqs"][0])
    tokens = fields["tokens"]
    owner = token_sequences(batch, num_tokens)
    tokens = jnp.where(tokens == FROM_DEVICE, known.last_token[rows[owner]], tokens)
    last_rows = jnp.maximum(fields["query_start"][1:] - 1, 0)
    num_drafts = fields["num_drafts"] if num_logits > 1 else jnp.zeros_like(context)
    sampling = fields["sampling"].at[:, Column.POSITION].set(context - num_drafts)
    if draft_ids is not None:
        first_draft = fields["query_start"][1:] - num_drafts
        place = jnp.arange(num_tokens, dtype=jnp.int32) - first_draft[owner]
        made = draft_ids[owner, jnp.clip(place, 0, draft_ids.shape[1] - 1)]
        tokens = jnp.where(tokens == FROM_DRAFT, made, tokens)
    if num_logits > 1:
        # A sequence's row before its drafts, then one for each draft; of those that it has not, any will do.
        last_rows = (last_rows - num_drafts)[:, None] + jnp.arange(num_logits, dtype=jnp.int32)
        last_rows = jnp.minimum(last_rows, num_tokens - 1)
        sampling = with_drafts(sampling, num_drafts, tokens[last_rows[:, 1:]])
        last_rows = last_rows.reshape(-1)
    return TokenRows(rows, tokens, token_positions(batch, num_tokens), last_rows, sampling, batch)


def block_updates(items: Iterable[ScheduledSequence]) -> list[tuple[int, int, int]]:
    """(row, index, block) of every block table entry that the device does not know yet."""
    updates: list[tuple[int, int, int]] = []
    for item in items:
        table, first = item.sequence.block_table, item.first_new_block
        if first < len(table):  # a decoding sequence opens a block in few of its steps
            updates += [(item.row, index, table[index]) for index in range(first, len(table))]
    return updates


def pack_step(
    plan: StepPlan, layout: StepLayout, updates: Sequence[tuple[int, int, int]], sampling: np.ndarray
) -> np.ndarray:
    """The packed array of one step. A fresh one each time: on CPU, JAX may read the memory in place while the step
    runs.

    Args:
        plan: what to run; must fit the layout's bucket.
        updates: at most `layout.num_updates` block table entries.
        sampling: int32[S, W], sampling parameters, padding included; the device fills in the positions.
    """
    packed = np.zeros(layout.size, np.int32)
    views, items = layout.views(packed), plan.items
    count = len(items)
    views["num_seqs"][0] = count
    starts = np.array([item.start for item in items], np.int32)
    lengths = np.array([item.num_tokens for item in items], np.int32)
    tokens = _tokens(items)
    views["tokens"][: len(tokens)] = tokens
    np.cumsum(lengths, out=views["query_start"][1 : count + 1])
    views["query_start"][count + 1 :] = len(tokens)
    views["context_lens"][:count] = starts + lengths
    if layout.bucket.num_logits > 1:
        views["num_drafts"][:count] = [len(item.drafts) for item in items]
    for index, item in enumerate(items):
        if item.is_relative:
            views["context_lens"][index] = -1 - len(item.drafts)
    views["rows"][:] = layout.num_rows
    views["rows"][:count] = [item.row for item in items]
    views["sampling"][:] = sampling
    views["updates"][:, 0] = layout.num_rows
    if updates:
        views["updates"][: len(updates)] = updates
    return packed


def _tokens(items: Iterable[ScheduledSequence]) -> list[int]:
    """The tokens of all items, one after another."""
    tokens: list[int] = []
    for sequence, _, start, num_tokens, _, _, _, drafts, _ in items:
        place = start - sequence.request.num_prompt_tokens
        if num_tokens == 1 and place >= 0:  # nearly all of them decode: one list for each would be most of the work
            outputs = sequence.output_token_ids
            tokens.append(outputs[place] if place < len(outputs) else FROM_DEVICE)
            continue
        tokens += sequence.token_ids(start, start + num_tokens - len(drafts))
        tokens += drafts
    return tokens
