"""Whole steps of the engine's own executables, back to back: what the device takes when the host never makes it wait.

The scheduler, the queues and the sampled tokens' way to the host are left out; weights, cache layout, buckets and
compiled functions are those that `build_engine` would make of the same settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.models import write_model
from benchmarks.gpu.part import Context, Record, Skip
from benchmarks.gpu.timing import Times, measure, noise
from engine.builder import load_weights, make_program
from engine.config import EngineConfig, Environment
from engine.errors import ConfigError
from engine.runtime.buckets import Bucket
from engine.runtime.device_state import ForwardState
from engine.runtime.executables import ModelProgram
from engine.runtime.packing import FROM_DEVICE
from engine.runtime.sampling import SamplerVariant, padding_params
from engine.runtime.sampling.inputs import Column
from models.functional import Params
from pallas_kernels.kv_layout import Pages
from pallas_kernels.registry import chosen_implementations

LONGEST = 33024  # tokens of the longest sequence: a prompt of 32k and room for outputs

# What a user would set, by what weights and keys and values are then stored in.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "bf16 / bf16": {},
    "bf16 / fp8": {"kv_cache_dtype": "fp8"},
    "fp8 / fp8": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
    "int4 / bf16": {"quantization": "int4"},
}


def engine_settings(model: Path, *, smoke: bool) -> dict[str, Any]:
    """Settings that all parts with an engine share, so that they find each other's executables in the cache."""
    sizes = (
        {"max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 16, "num_gpu_blocks_override": 64}
        if smoke
        else {"max_model_len": LONGEST, "max_num_seqs": 256, "max_num_batched_tokens": 8192}
    )
    return {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "show_progress": False,
        **sizes,
    }


def variant_config(context: Context, model: str, variant: str) -> EngineConfig:
    """The engine's configuration of a model in a variant.

    Raises:
        Skip: the engine does not know such settings.
    """
    settings = engine_settings(write_model(context.out / "models", model), smoke=context.smoke)
    try:
        return EngineConfig.from_flat(**settings, **VARIANTS[variant])
    except ConfigError as error:
        first_sentence = str(error).split(". ")[0]
        raise Skip(f"not built yet: {first_sentence}") from error


@dataclass(frozen=True)
class Measured:
    """One kind of step.

    Attributes:
        times: of a step, or of all steps that a prompt takes.
        enqueue_s: median time per step until the host had handed over its work. Near the time of the step itself, the
            host is what limits it.
        first_s: compiling and the first run.
        buckets: "tokens x sequences" of the steps.
    """

    times: Times
    enqueue_s: float
    compile_s: float
    buckets: str

    def as_record(self) -> Record:
        """For a result line."""
        return {
            **self.times.as_record(),
            "enqueue_us": self.enqueue_s * 1e6,
            "compile_s": self.compile_s,
            "bucket": self.buckets,
        }


class StepBench:
    """A loaded model, its device state, and those of its executables that were asked for.

    Args:
        config: of the engine.
        smoke: few repetitions.

    Raises:
        QuireError: as of `build_engine`.
    """

    def __init__(self, config: EngineConfig, *, smoke: bool) -> None:
        environment = Environment.read()
        loaded = load_weights(config.load, Path(config.load.model), lambda done, total, what: None)
        self.ledger, self.program = make_program(config, loaded, environment.cache_dir / "xla")
        self._params: Params = loaded.params
        self._smoke = smoke
        self._forward_state, self._sample_state = self.program.make_state()
        self._forward_state = _filled(self._forward_state)
        self._compiled: dict[Any, Any] = {}

    def decode(self, batch: int, context: int) -> Measured:
        """Steps of one token for each of `batch` sequences that have `context` tokens in the cache.

        Raises:
            Skip: they do not fit in the cache or the engine's limits.
        """
        limits = self.program.limits
        if batch > limits.max_num_seqs or context > limits.max_model_len:
            raise Skip(f"the limits are {limits.max_num_seqs} sequences of {limits.max_model_len} tokens")
        self._set_tables(batch, context)
        bucket = self.program.buckets.choose(batch, batch)
        packed = self._pack(bucket, [1] * batch, [context] * batch)
        return self._measure([(bucket, packed)])

    def prefill(self, tokens: int) -> Measured:
        """The steps that one prompt takes, as the scheduler would cut it.

        Raises:
            Skip: as of `decode`.
        """
        limits = self.program.limits
        if tokens > limits.max_model_len:
            raise Skip(f"the longest sequence has {limits.max_model_len} tokens")
        self._set_tables(1, tokens)
        steps = []
        for start in range(0, tokens, limits.max_num_batched_tokens):
            length = min(limits.max_num_batched_tokens, tokens - start)
            bucket = self.program.buckets.choose(length, 1)
            steps.append((bucket, self._pack(bucket, [length], [start + length])))
        return self._measure(steps)

    def _set_tables(self, batch: int, context: int) -> None:
        """Give each sequence its pages, in an order as mixed as in a server that has run for a while."""
        limits, layout = self.program.limits, self.program.cache
        each = -(-context // limits.block_size)
        if batch * each > layout.num_pages - 1:
            raise Skip(
                f"does not fit: {batch} x {context} tokens need {batch * each} KV blocks, there are "
                f"{layout.num_pages - 1} ({self.ledger})"
            )
        tables = np.zeros(self._forward_state.block_tables.shape, np.int32)
        pages = np.random.default_rng(0).permutation(layout.num_pages - 1)[: batch * each] + 1
        tables[:batch, :each] = pages.reshape(batch, each)
        self._forward_state = ForwardState(self._forward_state.cache, jnp.asarray(tables))

    def _pack(self, bucket: Bucket, lengths: list[int], contexts: list[int]) -> jax.Array:
        """The packed array of a step in which every sequence samples."""
        layout, padding = self.program.layout(bucket), self.program.limits.max_num_seqs
        packed = np.zeros(layout.size, np.int32)
        views, count, total = layout.views(packed), len(lengths), sum(lengths)
        views["num_seqs"][0] = count
        ids = np.random.default_rng(1).integers(3, self.program.config.vocab_size, total)
        views["tokens"][:total] = np.where(np.repeat(lengths, lengths) == 1, FROM_DEVICE, ids)
        views["query_start"][:] = total
        views["query_start"][: count + 1] = np.concatenate([[0], np.cumsum(lengths)])
        views["context_lens"][:count] = contexts
        views["rows"][:] = padding
        views["rows"][:count] = np.arange(count)
        views["sampling"][:] = padding_params()
        views["sampling"][:, Column.ROW] = views["rows"]
        views["sampling"][:count, Column.POSITION] = contexts
        views["updates"][:, 0] = padding
        return jnp.asarray(packed)

    def _measure(self, steps: list[tuple[Bucket, jax.Array]]) -> Measured:
        started = time.perf_counter()
        compiled = [self._executables(bucket) for bucket, _ in steps]
        compile_s = time.perf_counter() - started
        enqueue: list[float] = []

        def call() -> jax.Array:
            started, token = time.perf_counter(), None
            for (forward, sample), (_, packed) in zip(compiled, steps, strict=True):
                _, logits, sampling, self._forward_state, _ = forward(
                    self._params, self._forward_state, self._sample_state.rows, packed, None
                )
                sampled, self._sample_state = sample(logits, sampling, self._sample_state)
                token = sampled.token
            enqueue.append(time.perf_counter() - started)
            assert token is not None
            return token

        times = measure(call, smoke=self._smoke)
        buckets = ", ".join(dict.fromkeys(f"{bucket.num_tokens} x {bucket.num_seqs}" for bucket, _ in steps))
        return Measured(times, float(np.median(enqueue)), compile_s, buckets)

    def _executables(self, bucket: Bucket) -> tuple[Callable[..., Any], Callable[..., Any]]:
        program: ModelProgram = self.program
        jobs = {
            ("forward", bucket): lambda: program.lower_forward(bucket, self._params),
            ("sample", bucket.num_seqs): lambda: program.lower_sample(bucket.num_seqs, SamplerVariant.GREEDY),
        }
        for key, lower in jobs.items():
            if key not in self._compiled:
                self._compiled[key] = lower().compile()
        forward, sample = (self._compiled[key] for key in jobs)
        return forward, sample

    def about(self) -> Record:
        """What was built."""
        return {"implementations": chosen_implementations(), "memory": str(self.ledger)}


def _filled(state: ForwardState) -> ForwardState:
    """The same with numbers in the cache: a GPU multiplies zeros faster than anything else. The zeroed cache is freed
    layer by layer."""
    filled = []
    for index, pages in enumerate(state.cache):
        shape, dtype, has_scales = pages.data.shape, pages.data.dtype, pages.scales is not None
        pages.data.delete()
        scales = jnp.full(shape[:4], 1.0 / 127, jnp.float32) if has_scales else None
        filled.append(Pages(noise(shape, dtype, index), scales))
    return ForwardState(tuple(filled), state.block_tables)
