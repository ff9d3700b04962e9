"""`RecordingExecutor`: an executor that writes down what it is told, and what came of it."""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from dataclasses import astuple, replace
from importlib.metadata import version
from pathlib import Path

import jax
import msgspec
import numpy as np

from engine.config import EngineConfig
from engine.errors import CacheWriteError
from engine.remote.plain import to_plain
from engine.replay.events import VERSION, Collect, Event, Failed, Forward, Header, Item, NewSequence, Reset, Sample
from engine.requests.sequence import Sequence
from engine.runtime.buckets import Bucket
from engine.runtime.executables import ModelProgram
from engine.runtime.executor import Executor, InFlightStep, StartedStep, StepResult
from engine.runtime.lookup import Executables
from engine.scheduling.plan import ScheduledSequence, StepPlan
from models.functional import Params

logger = logging.getLogger("quire.record")


def header_of(config: EngineConfig, program: ModelProgram, num_blocks: int) -> Header:
    """What a replay must build to come to the same results.

    Args:
        num_blocks: KV blocks that the engine has.
    """
    limits, model = program.limits, Path(config.load.model)
    device = jax.devices()[0]
    settings = {
        **config.flat(),
        "model": str(model.resolve()) if model.exists() else config.load.model,
        "record": None,
        "max_model_len": limits.max_model_len,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "num_gpu_blocks_override": num_blocks,
        "kv_cache_memory_bytes": None,
    }
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy")}
    return Header(VERSION, settings, f"{device.platform}:{device.device_kind}", versions)


def digests(result: StepResult) -> dict[str, str]:
    """Of the bits of all results but the tokens, of those rows that mean something."""
    found: dict[str, str] = {}
    logprobs = result.sampled.logprobs
    rows = [
        row * result.num_logits + place
        for row, item in enumerate(result.plan.items)
        if item.samples and item.sequence.request.pooling is None
        for place in range(len(result.tokens[row]) if result.num_logits > 1 else 1)
    ]
    if logprobs is not None:
        found["logprobs"] = _digest(*(np.asarray(part)[rows] for part in jax.tree.leaves(logprobs)))
    if result.full_logprobs is not None:
        found["full_logprobs"] = _digest(result.full_logprobs[rows])
    if result.prompt_scores:
        scored = [np.asarray(part)[: s.count] for s in result.prompt_scores for part in jax.tree.leaves(s.scores)]
        found["prompt_logprobs"] = _digest(*scored)
    if result.pooled:
        found["pooled"] = _digest(*(part.total for part in result.pooled))
    return found


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def sampled_tokens(result: StepResult) -> list[list[int]]:
    """Per item, the tokens that it got; none where it did not sample."""
    return [
        tokens if item.samples and item.sequence.request.pooling is None else []
        for item, tokens in zip(result.plan.items, result.tokens, strict=True)
    ]


class RecordingExecutor(Executor):
    """Runs steps and records them. If the file cannot be written any more, it says so once and goes on without.

    Args:
        program, params, executables: as of `Executor`.
        path: is made anew, readable by its owner alone: it holds all prompts and answers.
        header: its first line.

    Raises:
        CacheWriteError: the file cannot be made.
    """

    def __init__(
        self, program: ModelProgram, params: Params, executables: Executables, path: Path, header: Header
    ) -> None:
        super().__init__(program, params, executables)
        self._path = path
        self._encoder = msgspec.json.Encoder()
        self._known: dict[Sequence, _Known] = {}
        self._num_seen = 0
        try:
            self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        except OSError as error:
            raise CacheWriteError(f"record={str(path)!r} cannot be written: {error.strerror or error}.") from error
        self._write(header)

    def reset_state(self) -> None:
        """See `Executor`."""
        self._write(Reset())
        super().reset_state()

    def forward(self, plan: StepPlan, bucket: Bucket | None = None) -> StartedStep:
        """See `Executor`."""
        items = [self._item(item) for item in plan.items] if self._file is not None else []
        try:
            started = super().forward(plan, bucket)
        except Exception as error:
            self._write(Forward(plan.step_id, items))
            self._write(Failed(plan.step_id, "forward", repr(error)))
            raise
        self._write(Forward(plan.step_id, items, astuple(started.bucket)))
        return started

    def sample(self, started: StartedStep, mask: np.ndarray | None = None) -> InFlightStep:
        """See `Executor`."""
        step = started.plan.step_id
        if mask is None:
            self._write(Sample(step))
        else:
            self._write(Sample(step, zlib.compress(mask.tobytes(), 1), mask.shape))
        try:
            return super().sample(started, mask)
        except Exception as error:
            self._write(Failed(step, "sample", repr(error)))
            raise

    def collect(self, step: InFlightStep) -> StepResult:
        """See `Executor`."""
        try:
            result = super().collect(step)
        except Exception as error:
            self._write(Failed(step.plan.step_id, "collect", repr(error)))
            raise
        if self._file is not None:
            self._write(Collect(step.plan.step_id, sampled_tokens(result), digests(result)))
        return result

    def _item(self, item: ScheduledSequence) -> Item:
        sequence = item.sequence
        known = self._known.get(sequence)
        if known is None:
            known = self._known[sequence] = _Known(self._num_seen)
            self._num_seen += 1
            request = to_plain(replace(sequence.request, prompt=None))
            self._write(NewSequence(known.number, request, sequence.index))
            self._forget_finished()
        outputs = sequence.output_token_ids[known.num_outputs :]
        known.num_outputs += len(outputs)
        return Item(
            known.number,
            *item[1:],
            blocks=sequence.block_table[item.first_new_block :],
            outputs=outputs,
            num_preemptions=sequence.num_preemptions,
        )

    def _forget_finished(self) -> None:
        """Drop what is kept of sequences that have ended, when as many are kept as there can be alive, twice over."""
        if len(self._known) > 2 * self.program.limits.max_num_seqs:
            self._known = {sequence: known for sequence, known in self._known.items() if not sequence.finished}

    def _write(self, event: Event | Header) -> None:
        if self._file is None:
            return
        line = memoryview(self._encoder.encode(event) + b"\n")
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            logger.error("recording to %s ends here: %s", self._path, error.strerror or error)
            os.close(self._file)
            self._file = None


class _Known:
    """What the file says of a sequence. Attributes: number: what it calls it; num_outputs: tokens that it was told."""

    __slots__ = ("num_outputs", "number")

    def __init__(self, number: int) -> None:
        self.number, self.num_outputs = number, 0
