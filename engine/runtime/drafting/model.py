"""`DraftModel`: a smaller model guesses.

It has weights and pages of its own; a block of the pool is a page of both models, so one block table serves both. What
it has not computed of a sequence yet (the prompt, and tokens of steps without drafts) it reads on command, before the
first step that needs it: prompts of sequences that are never drafted for cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.requests.sequence import Sequence
from engine.runtime.buckets import Bucket
from engine.runtime.compile import lower, shapes_of
from engine.runtime.device_state import RowTokens
from engine.runtime.drafting.drafter import DeviceDrafter, DeviceView, Drafted, DraftRows, Job, JobShapes
from engine.runtime.drafting.loop import draft_tokens
from engine.runtime.packing import StepLayout, pack_step, token_rows
from engine.runtime.sampling import padding_params
from engine.runtime.sampling.inputs import Column, SamplerVariant
from engine.scheduling.plan import ScheduledSequence, StepPlan
from models.decoder import Decoder
from models.functional import FunctionalModel, Params
from models.inputs import ForwardInputs
from pallas_kernels.kv_layout import KVLayout, Pages


@partial(jax.jit, static_argnames=("model", "layout"), donate_argnames=("state",))
def read_tokens(
    weights: Params,
    state: tuple[Pages, ...],
    block_tables: jax.Array,
    known: RowTokens,
    packed: jax.Array,
    *,
    model: FunctionalModel[Decoder],
    layout: StepLayout,
) -> tuple[Pages, ...]:
    """Compute keys and values of tokens that are known already.

    Args:
        weights: of the draft model.
        state: its pages, donated.
        block_tables: int32[R+1, B].
        known: of the rows.
        packed: int32[layout.size].
    """
    rows = token_rows(layout.unpack(packed), block_tables, known, layout.bucket.num_logits)
    inputs = ForwardInputs(rows.token_ids, rows.positions, rows.logit_rows, rows.batch)
    return model.bind(weights)(inputs, state)[1]


@dataclass
class _Progress:
    """How much of a sequence the drafter has computed.

    Attributes:
        num_preemptions: of the sequence when that was so; since then its blocks are others.
        num_computed: tokens at least.
        in_step: every step since had drafts, so that all tokens are computed that were accepted.
    """

    num_preemptions: int
    num_computed: int = 0
    in_step: bool = False


class DraftModel(DeviceDrafter):
    """See the module.

    Args:
        model: the smaller decoder's structure.
        params: its weights.
        cache: pages of one of its layers.
        num_layers: it has.
    """

    def __init__(self, model: FunctionalModel[Decoder], params: Params, cache: KVLayout, num_layers: int) -> None:
        self._model, self._cache, self._num_layers = model, cache, num_layers
        self.weights = params
        self.extra_bytes = sum(array.on_device_size_in_bytes() for array in jax.tree.leaves(params))
        self.block_bytes = cache.page_bytes * num_layers
        self._progress: dict[Sequence, _Progress] = {}

    def draft(
        self, weights: Any, state: Any, cache: tuple[Pages, ...], rows: DraftRows, count: int, variant: SamplerVariant
    ) -> Drafted:
        """See `DeviceDrafter`."""
        ids, pages = draft_tokens(self._model.bind(weights), state, rows, count, variant, own_cache=True)
        return Drafted(ids, cache, pages)

    def make_state(self, num_pages: int, num_rows: int) -> tuple[Pages, ...]:
        """See `DeviceDrafter`."""
        del num_rows
        return tuple(replace(self._cache, num_pages=num_pages).empty() for _ in range(self._num_layers))

    def jobs(self, shapes: JobShapes) -> Iterator[Job]:
        """See `DeviceDrafter`."""
        for bucket in shapes.buckets.all():
            if bucket.num_logits == 1:
                name = f"reading of {bucket.num_tokens} tokens of {bucket.num_seqs} sequences"
                yield ("read", bucket), name, partial(self._lower_read, bucket, shapes)

    def _lower_read(self, bucket: Bucket, shapes: JobShapes) -> Any:
        layout = shapes.layout(bucket)
        packed = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        arguments = (shapes_of(self.weights), shapes.state, shapes.block_tables, shapes.known, packed)
        return lower(read_tokens, *arguments, donate=("state",), model=self._model, layout=layout)

    def lags(self, sequence: Sequence) -> bool:
        """See `DeviceDrafter`."""
        return not self._of(sequence).in_step

    def prepare(self, plan: StepPlan, state: Any, device: DeviceView) -> Any:
        """Read what is missing of the sequences that get drafts."""
        late: list[ScheduledSequence] = []
        for item in plan.items:
            sequence = item.sequence
            if not item.drafts:
                found = self._progress.get(sequence)
                if found is not None and found.in_step:
                    # Of the tokens that the host has read all but the last were computed by the steps with drafts.
                    num_read = sequence.num_prompt_tokens + len(sequence.output_token_ids)
                    found.num_computed, found.in_step = num_read - 1, False
                continue
            progress = self._of(sequence)
            if progress.in_step:
                continue
            assert not item.is_relative, "the host reads all tokens of a sequence that lags"
            if progress.num_computed < item.start:
                num_tokens = item.start - progress.num_computed
                late.append(item._replace(start=progress.num_computed, num_tokens=num_tokens, samples=False, drafts=()))
            progress.in_step = True
        for part in parts_of(late, device.buckets.max_num_tokens):
            state = self._read(part, state, device)
        return state

    def _read(self, items: list[ScheduledSequence], state: Any, device: DeviceView) -> Any:
        bucket = device.buckets.choose(sum(item.num_tokens for item in items), len(items))
        sampling = np.tile(padding_params(), (bucket.num_seqs, 1))
        layout = device.layout(bucket)
        sampling[:, Column.ROW] = layout.num_rows
        packed = pack_step(StepPlan(-1, tuple(items)), layout, (), sampling)
        return device.compiled(("read", bucket))(self.weights, state, device.block_tables, device.known, packed)

    def _of(self, sequence: Sequence) -> _Progress:
        found = self._progress.get(sequence)
        if found is None or found.num_preemptions != sequence.num_preemptions:
            found = self._progress[sequence] = _Progress(sequence.num_preemptions)
        return found

    def forget(self, sequence: Sequence) -> None:
        """See `DeviceDrafter`."""
        self._progress.pop(sequence, None)

    def forget_all(self) -> None:
        """See `DeviceDrafter`."""
        self._progress.clear()


def parts_of(items: Iterable[ScheduledSequence], most_tokens: int) -> Iterator[list[ScheduledSequence]]:
    """Steps of at most so many tokens that compute what the items say, in order; long ones are cut."""
    part: list[ScheduledSequence] = []
    room = most_tokens
    for item in items:
        start, stop = item.start, item.start + item.num_tokens
        while start < stop:
            num_tokens = min(room, stop - start)
            part.append(item._replace(start=start, num_tokens=num_tokens))
            start, room = start + num_tokens, room - num_tokens
            if room == 0:
                yield part
                part, room = [], most_tokens
    if part:
        yield part
