"""The parts of speculative decoding that know the device: step times, measured before the first request."""

from __future__ import annotations

import time

import jax

from engine.runtime.buckets import Bucket
from engine.runtime.executor import Executor
from engine.speculative.device import DeviceSpeculator
from engine.speculative.ngram import NgramProposer
from engine.speculative.proposer import Proposer
from engine.speculative.protocol import AnySpeculator
from engine.speculative.settings import SpeculativeSettings
from engine.speculative.speculator import Speculator
from engine.speculative.suffix import SuffixOptions, SuffixProposer
from engine.speculative.times import StepTimes

REPETITIONS = 3


def make_speculator(settings: SpeculativeSettings | None, executor: Executor) -> AnySpeculator | None:
    """What guesses and decides, as the settings say; None without settings."""
    if settings is None:
        return None
    times = measure_step_times(executor) if settings.adaptive else None
    num_drafts, verify = settings.num_speculative_tokens, executor.program.buckets.verify()
    # Without times nobody chooses: all drafts must have room. With them each shape counts.
    most_seqs = max(b.num_seqs for b in verify if settings.adaptive or b.num_logits == num_drafts + 1)
    drafter = executor.program.drafter
    if drafter is not None:
        return DeviceSpeculator(num_drafts, times, most_seqs, drafter.lags, drafter.forget)
    return Speculator(make_proposer(settings), times, most_seqs)


def make_proposer(settings: SpeculativeSettings) -> Proposer:
    """What makes the guesses of the settings' method."""
    if settings.method == "ngram":
        return NgramProposer(settings.prompt_lookup_min, settings.prompt_lookup_max, settings.num_speculative_tokens)
    options = SuffixOptions(
        num_drafts=settings.num_speculative_tokens,
        max_depth=settings.suffix_decoding_max_tree_depth,
        spec_factor=settings.suffix_decoding_max_spec_factor,
        least_prob=settings.suffix_decoding_min_token_prob,
        most_outputs=settings.suffix_decoding_max_cached_requests,
    )
    return SuffixProposer(options)


def measure_step_times(executor: Executor) -> StepTimes:
    """Seconds of each step shape of decoding, with and without drafts, on empty rows: smallest of `REPETITIONS`."""
    buckets = executor.program.buckets
    verify = buckets.verify()
    sizes = {bucket.num_seqs for bucket in verify}
    shapes = [*(Bucket(size, size) for size in buckets.seq_sizes if size in sizes), *verify]
    # In turn: what slows the machine for a moment slows one of each, not all of one.
    turns = [{shape: _measure(executor, shape) for shape in shapes} for _ in range(REPETITIONS)]
    found = {shape: min(turn[shape] for turn in turns) for shape in shapes}
    times = {
        drafts: {shape.num_seqs: found[shape] for shape in shapes if shape.num_logits == drafts + 1}
        for drafts in (0, *buckets.draft_sizes)
    }
    return StepTimes(times.pop(0), times)


def _measure(executor: Executor, bucket: Bucket) -> float:
    started = time.perf_counter()
    jax.block_until_ready(executor.run_empty(bucket))
    return time.perf_counter() - started
