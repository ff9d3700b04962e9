"""Parameters from host to device, one at a time, with bounded host memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import numpy as np

from models.layers.product import Weight
from models.loading.source import Progress

NUM_THREADS = min(8, os.cpu_count() or 1)  # that copy or read one parameter together
_PARALLEL_BYTES = 1 << 20  # below this one thread is faster
_ALIGNMENT = 64  # bytes; XLA on CPU takes over a buffer that is aligned so, instead of copying it


def _nothing(name: str) -> Weight:
    raise KeyError(f"{name} is not packed")


@dataclass(frozen=True)
class Packed:
    """Parameters that do not become plain arrays.

    Attributes:
        sizes_bytes: parameter -> bytes, for progress.
        make: (parameter) -> the weight on the device.
    """

    sizes_bytes: Mapping[str, int] = field(default_factory=dict)
    make: Callable[[str], Weight] = _nothing


def total_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, packed: Mapping[str, int] | None = None) -> int:
    """Size of all parameters as served, of which those in `packed` have that many bytes."""
    packed = packed or {}
    return sum(packed[name] if name in packed else math.prod(shape) * dtype.itemsize for name, shape in shapes.items())


def shares(count: int, multiple: int, size_bytes: int) -> list[slice]:
    """Cut `range(count)`, which stands for `size_bytes` of work, into one share per thread.

    Every share but the last is a multiple of `multiple` long.
    """
    num_threads = NUM_THREADS if size_bytes > _PARALLEL_BYTES else 1
    step = max(1, -(-count // (num_threads * multiple))) * multiple
    return [slice(start, min(count, start + step)) for start in range(0, count, step)]


def stream_to_device(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    fill: Callable[[str, np.ndarray], None],
    progress: Progress | None = None,
    packed: Packed | None = None,
) -> dict[str, Weight]:
    """Let `fill(name, host)` write each parameter into a host buffer and hand the buffer to the default device; those
    in `packed` are made by it instead.

    A transfer runs while the next buffer is filled, and no further ahead: at most two host buffers are alive.

    Returns:
        name → array of `shapes[name]` and `dtype`, or packed weight, all there.
    """
    packed = packed or Packed()
    total, done = total_bytes(shapes, dtype, packed.sizes_bytes), 0
    params: dict[str, Weight] = {}
    in_flight: jax.Array | None = None
    for name, shape in shapes.items():
        if name in packed.sizes_bytes:
            params[name] = packed.make(name)
        else:
            host = aligned_empty(shape, dtype)
            fill(name, host)
            if in_flight is not None:
                in_flight.block_until_ready()
            in_flight = params[name] = jax.device_put(host)
        done += total_bytes({name: shape}, dtype, packed.sizes_bytes)
        if progress is not None:
            progress(done, total, name)
    return jax.block_until_ready(params)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A host buffer that XLA on CPU takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
