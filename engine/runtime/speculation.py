"""The parts of speculative decoding that know the device: step times, measured before the first request."""

from __future__ import annotations

import time

import jax
import numpy as np

from engine.runtime.buckets import Bucket
from engine.runtime.executor import Executor
from engine.speculative.ngram import NgramProposer
from engine.speculative.settings import SpeculativeSettings
from engine.speculative.speculator import Speculator
from engine.speculative.times import StepTimes

REPETITIONS = 3


def make_speculator(settings: SpeculativeSettings | None, executor: Executor) -> Speculator | None:
    """What guesses and decides, as the settings say; None without settings."""
    if settings is None:
        return None
    proposer = NgramProposer(settings.prompt_lookup_min, settings.prompt_lookup_max, settings.num_speculative_tokens)
    return Speculator(proposer, measure_step_times(executor) if settings.adaptive else None)


def measure_step_times(executor: Executor) -> StepTimes:
    """Seconds of each step shape of decoding, with and without drafts, on empty rows: smallest of `REPETITIONS`."""
    buckets = executor.program.buckets
    verify = buckets.verify()
    sizes = {bucket.num_seqs for bucket in verify}
    plain = [Bucket(size, size) for size in buckets.seq_sizes if size in sizes]
    return StepTimes(
        {bucket.num_seqs: _measure(executor, bucket) for bucket in plain},
        {bucket.num_seqs: _measure(executor, bucket) for bucket in verify},
    )


def _measure(executor: Executor, bucket: Bucket) -> float:
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        jax.block_until_ready(executor.run_empty(bucket))
        seconds.append(time.perf_counter() - started)
    return float(np.min(seconds))
