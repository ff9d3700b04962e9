"""Times of device work: minimum and median over samples, each of many calls in a row that end with one wait.

Two things would make a memory-bound kernel look faster than it is: operands that still lie in the device's L2 cache
from the last call, and calls that overlap. So a timed executable runs over several sets of operands that together are
several times as large as the cache (`rotations`), and its commands run strictly in order (`IN_ORDER`). One executable
for all sets also keeps the host's 10 µs per call out of kernels that take 5.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.part import Record

L2_BYTES = 60 << 20
MOST_ROTATIONS = 16
SAMPLES, SAMPLE_S, MOST_CALLS = 10, 0.05, 200
FEW_SAMPLES, LONG_S = 3, 0.3  # samples of work that takes longer than this
# Commands of one graph may overlap otherwise, where nothing depends on the one before.
IN_ORDER = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}


@dataclass(frozen=True)
class Times:
    """Seconds of one piece of work.

    Attributes:
        min_s, median_s: over samples; a sample is the mean of its calls.
        first_s: of the very first call, compilation included.
        num_samples, calls_per_sample: how often.
    """

    min_s: float
    median_s: float
    first_s: float
    num_samples: int
    calls_per_sample: int

    def as_record(self) -> Record:
        """For a result line."""
        return {
            "us_min": self.min_s * 1e6,
            "us": self.median_s * 1e6,
            "first_s": self.first_s,
            "samples": f"{self.num_samples} of {self.calls_per_sample} calls",
        }


def rotations(set_bytes: int) -> int:
    """How many sets of operands keep each other out of the cache."""
    return max(1, min(MOST_ROTATIONS, -(-4 * L2_BYTES // max(1, set_bytes))))


def measure(
    call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready, *, work: int = 1, smoke: bool = False
) -> Times:
    """Time a call that starts work on the device and returns at once.

    Args:
        call: starts `work` equal pieces of work.
        wait: gets what the last call returned; returns when the device is through.
        work: the times are divided by it.
        smoke: two samples of one call.
    """
    started = time.perf_counter()
    wait(call())
    first_s = time.perf_counter() - started
    # A command buffer is recorded at the second call and updated at the third.
    estimate = 0.0
    for _ in range(1 if smoke else 3):
        estimate = _sample(call, wait, 1)
    calls = 1 if smoke else max(1, min(MOST_CALLS, int(SAMPLE_S / max(estimate, 1e-6))))
    num_samples = 2 if smoke else FEW_SAMPLES if estimate > LONG_S else SAMPLES
    samples = [_sample(call, wait, calls) / work for _ in range(num_samples)]
    return Times(min(samples), statistics.median(samples), first_s, len(samples), calls)


def _sample(call: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> float:
    result = None
    started = time.perf_counter()
    for _ in range(calls):
        result = call()
    wait(result)
    return (time.perf_counter() - started) / calls


def in_order(function: Callable[..., Any]) -> Any:
    """`jax.jit` of a function whose parts must not overlap on a GPU."""
    on_gpu = jax.devices()[0].platform == "gpu"
    return jax.jit(function, compiler_options=IN_ORDER if on_gpu else None)


def time_chain(step: Callable[[Any, Any], Any], start: Any, sets: Sequence[Any], *, smoke: bool) -> Times:
    """Time `x = step(x, set)` over all sets, per step. What comes out must have the shape of what goes in."""

    def chain(x: Any, sets: Sequence[Any]) -> Any:
        for operands in sets:
            x = step(x, operands)
        return x

    compiled = in_order(chain)
    return measure(lambda: compiled(start, sets), work=len(sets), smoke=smoke)


def time_each(step: Callable[[Any], Any], sets: Sequence[Any], *, smoke: bool) -> Times:
    """Time `step(set)` over all sets, per step, where nothing can be handed on."""
    compiled = in_order(lambda sets: [step(operands) for operands in sets])
    return measure(lambda: compiled(sets), work=len(sets), smoke=smoke)


def noise(shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    """Numbers that look random, of unit variance (integers: of the dtype's whole range but its lowest number).

    A hash of the element's index, which XLA computes in one pass without a temporary array: fills a cache that takes
    all of the memory.
    """
    return _noise(jnp.uint32(seed), shape=tuple(shape), dtype=jnp.dtype(dtype))


def _hash(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    word = index * jnp.uint32(0x9E3779B1) + seed * jnp.uint32(0x85EBCA77) + jnp.uint32(0x27D4EB2F)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):  # finalizer of a multiply-xorshift hash
        word = (word ^ (word >> shift)) * jnp.uint32(factor)
    return word ^ (word >> 15)


def _make_noise(seed: jax.Array, *, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    unit = (_hash(seed, shape) >> 8).astype(jnp.float32) * 2.0**-23 - 1.0  # [-1, 1)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.round(unit * float(jnp.iinfo(dtype).max)).astype(dtype)
    return (unit * 3**0.5).astype(dtype)


_noise = jax.jit(_make_noise, static_argnames=("shape", "dtype"))
