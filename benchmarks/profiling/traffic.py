"""Real steps of a real engine under a trace: the engine's own loop, scheduler and executables."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax

from benchmarks.expected_compiles import expected_compiles
from benchmarks.profiling.hlo import Instruction, parse
from benchmarks.profiling.trace import Event, options, read
from engine.built import BuiltEngine
from engine.runtime.buckets import Bucket
from engine.sampling_params import SamplingParams

HOST_PARTS = ("plan", "dispatch", "collect", "commit")


@dataclass(frozen=True)
class Situation:
    """Equal steps to look at.

    Attributes:
        name: for the table.
        num_rows: sequences that decode one token per step; 0 = steps that each compute one whole prompt.
        length: context of a decoding sequence when the trace begins, or tokens of a prompt.
    """

    name: str
    num_rows: int
    length: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens computed by a step."""
        return self.num_rows or self.length

    @property
    def seqs_per_step(self) -> int:
        """Sequences in a step."""
        return self.num_rows or 1


@dataclass(frozen=True)
class Observed:
    """What some equal steps did.

    Attributes:
        step_s: median wall time of a step without a trace, in seconds.
        host_s: mean time of each host part of those steps, in seconds. Collect includes waiting for the device.
        events: of the traced steps.
    """

    step_s: float
    host_s: dict[str, float]
    events: list[Event]


def bucket_of(built: BuiltEngine, situation: Situation) -> Bucket:
    """The static shape that the situation's steps run in."""
    return built.core.executor.program.buckets.choose(situation.tokens_per_step, situation.seqs_per_step)


def instructions_of(built: BuiltEngine, bucket: Bucket) -> dict[str, Instruction]:
    """The forward pass of a bucket, compiled once more to read its text."""
    program = built.core.executor.program
    shapes = cast(Any, program.model.shapes)  # lowering looks at nothing else
    with _no_compilation_cache(), expected_compiles():
        return parse(program.lower_forward(bucket, shapes).compile().as_text())


@contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """An entry of the persistent cache may stem from an older source, whose places in the code are not today's."""
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def observe(built: BuiltEngine, situation: Situation, num_steps: int, directory: Path) -> Observed:
    """Run `num_steps` equal steps without, then as many with a trace.

    Args:
        directory: gets the trace.
    """
    fill = fill_decoding if situation.num_rows else _fill_prompts
    spare = 3  # the steps at the ends of a trace are not whole, and two are in flight
    fill(built, situation, 2 * num_steps + 2 * spare)
    core, times = built.core, []
    core.step()
    before = dataclasses.asdict(core.stats)
    for _ in range(num_steps):
        started = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - started)
    after = dataclasses.asdict(core.stats)
    host = {part: (after[f"{part}_s"] - before[f"{part}_s"]) / num_steps for part in HOST_PARTS}
    with jax.profiler.trace(directory, profiler_options=options()):
        for _ in range(num_steps + spare):
            core.step()
    empty(built)
    return Observed(statistics.median(times), host, read(directory))


_ids = itertools.count()


def _add(built: BuiltEngine, prompt_len: int, output_len: int) -> None:
    draw = random.Random(next(_ids))  # own ids: a prefix cache must not shorten a prompt
    prompt = [draw.randrange(100, built.model.vocab_size) for _ in range(prompt_len)]
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    built.core.add(built.inputs.make(prompt, params))


def fill_decoding(built: BuiltEngine, situation: Situation, num_steps: int) -> None:
    """All rows past their prompts, with tokens left for the steps to come."""
    first_len = built.limits.max_num_batched_tokens // situation.length  # prompts that one step takes in
    prefill_steps = -(-situation.num_rows // max(1, first_len)) + 1
    for _ in range(situation.num_rows):
        _add(built, situation.length, num_steps + 2 * prefill_steps)
    _run_until(built, lambda: built.core.scheduler.stats().num_waiting == 0)
    for _ in range(prefill_steps):
        built.core.step()


def _fill_prompts(built: BuiltEngine, situation: Situation, num_steps: int) -> None:
    """One prompt per step, each as long as the token budget of a step."""
    for _ in range(num_steps):
        _add(built, situation.length, 1)
    built.core.step()


def _run_until(built: BuiltEngine, done: Callable[[], bool]) -> None:
    while not done():
        built.core.step()


def empty(built: BuiltEngine) -> None:
    _run_until(built, lambda: not built.core.has_work)
