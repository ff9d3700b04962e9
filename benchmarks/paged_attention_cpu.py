"""What attention costs on a CPU, in C++ and on XLA: `python -m benchmarks.paged_attention_cpu`.

A step's layers one after the other, each with pages of its own, each waiting for the one before; both implementations
in turn in one process. Printed are, per workload: XLA's smallest time of a layer, the native one's, their ratio, the
median of the ratios of one turn, and the rate at which the native one reads keys and values or computes.
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
from engine.config import Environment
from pallas_kernels import native
from pallas_kernels.kv_layout import QUANTIZED, Pages
from pallas_kernels.paged_attention import AttentionProblem, paged_attention, plan_attention
from pallas_kernels.paged_attention.cases import Case
from pallas_kernels.ragged import RaggedBatch

IMPLEMENTATIONS = ("xla", "native_cpu")
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Qwen3-0.6B": (16, 8, 128), "Llama-3.1-8B": (32, 8, 128)}
CASES = "1x128,1x512,1x2048,8x128,8x512,8x2048,16x512,64x128,64x512,512@512,512@1024"
PAGE = 16


def parse_case(text: str, shape: tuple[int, int, int]) -> Case:
    """A workload from "ROWSxCONTEXT" (decode), or "TOKENS@CONTEXT" (a chunk of a prompt, up to that context)."""
    heads, kv_heads, dim = shape
    if "@" in text:
        tokens, context = map(int, text.split("@"))
        lengths, contexts = (tokens,), (context,)
    else:
        rows, context = map(int, text.split("x"))
        lengths, contexts = (1,) * rows, (context,) * rows
    return Case(text, lengths, contexts, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, page_size=PAGE)


def num_pairs(case: Case) -> int:
    """Pairs of a query token and a key that it sees."""
    return sum(n * c - n * (n - 1) // 2 for n, c in zip(case.query_lens, case.context_lens, strict=True))


def batch_of(case: Case, tables: np.ndarray) -> RaggedBatch:
    """The ragged batch of a workload without padding."""
    starts = np.concatenate([[0], np.cumsum(case.query_lens)]).astype(np.int32)
    contexts = jnp.asarray(case.context_lens, jnp.int32)
    return RaggedBatch(jnp.asarray(starts), contexts, jnp.asarray(tables), jnp.int32(len(case.query_lens)))


def make_pages(case: Case, num_pages: int, kv_dtype: str, rng: np.random.Generator) -> Pages:
    """Random pages of one layer."""
    shape = (num_pages, 2, case.num_kv_heads, case.page_size, case.head_dim)
    if kv_dtype in QUANTIZED:
        stored = jnp.asarray(rng.integers(-100, 100, shape), jnp.int8).astype(kv_dtype)
        return Pages(stored, jnp.full(shape[:4], 0.02, jnp.float32))
    return Pages(jnp.asarray(rng.standard_normal(shape, np.float32), kv_dtype))


def measure(case: Case, dtype: str, kv_dtype: str, layers: int, turns: int) -> dict[str, list[float]]:
    """Seconds of a layer, in each turn of each implementation."""
    rng = np.random.default_rng(0)
    tables, num_pages = case.block_tables(rng)
    batch = batch_of(case, tables)
    pages = [make_pages(case, num_pages, kv_dtype, rng) for _ in range(layers)]
    tokens = case.padded_tokens
    q = jnp.asarray(rng.standard_normal((tokens, case.num_heads, case.head_dim)), dtype)

    def step_with(implementation: str) -> Callable[..., jax.Array]:
        sizes = (case.num_heads, case.num_kv_heads, case.head_dim, case.page_size)
        problem = AttentionProblem(*sizes, dtype, kv_dtype, implementation)

        @jax.jit
        def step(q: jax.Array, pages: list[Pages], batch: RaggedBatch) -> jax.Array:
            plan = plan_attention(batch, tokens, problem)
            for layer in pages:
                q = paged_attention(q, layer, plan, problem, scale=case.head_dim**-0.5)
            return q

        return step

    forms = {name: step_with(name) for name in IMPLEMENTATIONS}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(turns + 2):  # the first compiles, the second warms
        for name, run in forms.items():
            started = time.perf_counter()
            run(q, pages, batch).block_until_ready()
            if turn > 1:
                times[name].append((time.perf_counter() - started) / layers)
    return times


def line(case: Case, dtype: str, kv_dtype: str, layers: int, turns: int) -> list[str]:
    """Of the table."""
    times = measure(case, dtype, kv_dtype, layers, turns)
    old, new = (times[name] for name in IMPLEMENTATIONS)
    per_token = case.head_dim * jnp.dtype(kv_dtype).itemsize + (4 if kv_dtype in QUANTIZED else 0)
    num_bytes = 2 * case.num_kv_heads * per_token * sum(case.context_lens)
    return [
        case.name,
        f"{min(old) * 1e6:.0f}",
        f"{min(new) * 1e6:.0f}",
        f"{min(new) / min(old):.2f}",
        f"{statistics.median(b / a for a, b in zip(old, new, strict=True)):.2f}",
        f"{num_bytes / min(new) / 1e9:.1f}",
        f"{4 * num_pairs(case) * case.num_heads * case.head_dim / min(new) / 1e9:.0f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse flags, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="SmolLM2-135M")
    parser.add_argument(
        "--cases", default="1x128,1x512,1x2048,8x128,8x512,8x2048,16x512,64x128,64x512,512@512,512@1024"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--kv-dtype", choices=("auto", "int8", "float8_e4m3fn"), default="auto")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args(arguments)
    native.configure(Environment.read().cache_dir / "native")
    kv_dtype = options.dtype if options.kv_dtype == "auto" else options.kv_dtype
    head = ["workload", "XLA, µs", "native, µs", "ratio", "median ratio", "native, GB/s", "native, GFLOP/s"]
    cases = [parse_case(text, SHAPES[options.model]) for text in options.cases.split(",")]
    lines = [line(case, options.dtype, kv_dtype, options.layers, options.turns) for case in cases]
    print(f"{options.model}, {options.dtype}, pages {kv_dtype}, {options.layers} layers, {options.turns} turns\n")
    print(table(head, lines))


if __name__ == "__main__":
    main()
