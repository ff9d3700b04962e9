"""What the machine reaches at best: memory read bandwidth and the rate of large matrix products.

Best of several tries, so a lower bound of the true ceiling. Each engine's process measures with its own library
(`Ceilings.merged` keeps the best), under the conditions of the benchmark run itself. No library is imported here but
numpy: the torch measurement hands in its own product.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np

READ_BYTES = 512 * 2**20  # far beyond any cache
GEMM_SIZE = 2048
TRIES = 5


@dataclass(frozen=True)
class Ceilings:
    """Lower bounds of what the machine can do.

    Attributes:
        read_bytes_per_s: reading memory, by method.
        flops_per_s: matrix products of `GEMM_SIZE`, by "method dtype" as in "jax bfloat16".
    """

    read_bytes_per_s: dict[str, float] = field(default_factory=dict)
    flops_per_s: dict[str, float] = field(default_factory=dict)

    @property
    def best_read(self) -> float | None:
        """Bytes per second of the best method; None if nothing was measured."""
        return max(self.read_bytes_per_s.values(), default=None)

    def best_flops(self, dtype: str) -> float | None:
        """Operations per second of the best method in a dtype; None if nothing was measured."""
        rates = [rate for name, rate in self.flops_per_s.items() if name.endswith(f" {dtype}")]
        return max(rates, default=None)

    def merged(self, other: Ceilings) -> Ceilings:
        """The better of both, by method."""
        return Ceilings(
            _best(self.read_bytes_per_s, other.read_bytes_per_s), _best(self.flops_per_s, other.flops_per_s)
        )

    def as_json(self) -> dict[str, dict[str, float]]:
        """For a message or a file; `Ceilings(**…)` reads it back."""
        return asdict(self)


def _best(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    zero = dict.fromkeys((*first, *second), 0.0)
    return {name: max(first.get(name, 0.0), second.get(name, 0.0)) for name in zero}


def fastest(work: Callable[[], object], tries: int = TRIES) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    work()
    best = float("inf")
    for _ in range(tries):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def read_with_numpy(num_threads: int) -> float:
    """Bytes per second of a maximum over a large array, one part per thread (numpy lets go of the interpreter)."""
    parts = np.array_split(np.ones(READ_BYTES // 4, np.float32), num_threads)
    with ThreadPoolExecutor(num_threads) as pool:
        return READ_BYTES / fastest(lambda: list(pool.map(np.max, parts)))


def gemm_rate(product: Callable[[], object]) -> float:
    """Operations per second of a product of two square matrices of `GEMM_SIZE`."""
    return 2 * GEMM_SIZE**3 / fastest(product)


def numpy_ceilings(num_threads: int) -> Ceilings:
    """Reading, and float32 products through numpy's BLAS."""
    square = np.ones((GEMM_SIZE, GEMM_SIZE), np.float32)
    return Ceilings(
        {"numpy": read_with_numpy(num_threads)}, {"numpy float32": gemm_rate(lambda: np.matmul(square, square))}
    )
