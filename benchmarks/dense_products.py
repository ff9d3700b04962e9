"""What dense products cost on a CPU, in C++ and on XLA: `python -m benchmarks.dense_products`.

A step's products one after the other, each waiting for the one before, with more weights than the caches hold; both
implementations in turn in one process. Printed are, per number of rows: XLA's smallest time, the native one's, their
ratio, the median of the ratios of one turn, and the rate at which the native one reads weights or computes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.markdown import table
from benchmarks.packed_products import SHAPES, step
from engine.config import Environment
from pallas_kernels import native
from pallas_kernels.matmul import matmul

HEAD = "head"
WORKLOADS = {
    **SHAPES,
    HEAD: ((576, 49152),),
    "Qwen3-0.6B": ((1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024)) * 4,
}
IMPLEMENTATIONS = ("xla", "native_cpu")


def measure(workload: str, rows: int, dtype: str, turns: int) -> dict[str, list[float]]:
    """Seconds of each turn of each implementation."""
    shapes, rng, transposed = WORKLOADS[workload], np.random.default_rng(0), workload == HEAD
    dense = [jnp.asarray(rng.standard_normal(s[::-1] if transposed else s) * s[0] ** -0.5, dtype) for s in shapes]
    x = jnp.asarray(rng.standard_normal((rows, max(k for k, _ in shapes))), dtype)

    def run_with(implementation: str) -> Callable[..., jax.Array]:
        def product(x: jax.Array, w: jax.Array) -> jax.Array:
            out_dtype = jnp.float32 if transposed else x.dtype
            y = matmul(x, w, transposed=transposed, out_dtype=out_dtype, implementation=implementation)
            return y.astype(x.dtype)

        return step(product, shapes)

    forms = {name: run_with(name) for name in IMPLEMENTATIONS}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(turns + 1):  # the first one compiles
        for name, run in forms.items():
            started = time.perf_counter()
            run(x, dense).block_until_ready()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def line(workload: str, rows: int, dtype: str, turns: int) -> list[str]:
    """Of the table."""
    times = measure(workload, rows, dtype, turns)
    old, new = (times[name] for name in IMPLEMENTATIONS)
    size = sum(k * n for k, n in WORKLOADS[workload])
    return [
        str(rows),
        f"{min(old) * 1e3:.2f}",
        f"{min(new) * 1e3:.2f}",
        f"{min(new) / min(old):.2f}",
        f"{statistics.median(b / a for a, b in zip(old, new, strict=True)):.2f}",
        f"{size * jnp.dtype(dtype).itemsize / min(new) / 1e9:.1f}",
        f"{2 * rows * size / min(new) / 1e9:.0f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse flags, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="SmolLM2-135M")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,512")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args(arguments)
    native.configure(Environment.read().cache_dir / "native")
    head = ["rows", "XLA, ms", "native, ms", "ratio", "median ratio", "native, GB/s", "native, GFLOP/s"]
    lines = [line(options.workload, int(m), options.dtype, options.turns) for m in options.rows.split(",")]
    print(f"{options.workload}, {options.dtype}, {options.turns} turns\n")
    print(table(head, lines))


if __name__ == "__main__":
    main()
