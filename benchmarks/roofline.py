"""The least time a workload can take: its bytes over the memory bandwidth, its operations over the GEMM rate.

    decode of one sequence   every token reads all weights and the context's keys and values
    prefill, full batches    2 operations per weight and token, 4·H·D per layer for each (query, key) pair

A floor is for the best algorithm on ideal hardware of the measured ceilings (`ceilings.py`); % of roofline = floor /
measured time. Embedding look-ups, norms and activations are left out: they are under 1 %.

    python -m benchmarks.roofline [--model demo] [--dtype bfloat16]       # this machine's ceilings and the floors
"""

from __future__ import annotations

import argparse
import os

import jax
import jax.numpy as jnp

from benchmarks.ceilings import GEMM_SIZE, READ_BYTES, Ceilings, fastest, gemm_rate, numpy_ceilings
from benchmarks.costs import ITEM_BYTES, ModelCosts
from benchmarks.workloads.cpu_smollm2 import WORKLOADS, Workload
from engine.config import Environment
from models.config import ModelConfig
from models.loading.load import read_config
from models.loading.resolver import FetchOptions, resolve_model


def decode_floor_s(costs: ModelCosts, workload: Workload, ceilings: Ceilings) -> float | None:
    """Least time per output token of a workload of one request, in seconds; None without a bandwidth."""
    bandwidth = ceilings.best_read
    if bandwidth is None:
        return None
    context = workload.prompt_lens[0] + (workload.output_lens[0] + 1) / 2
    return costs.decode_bytes(context) / bandwidth


def compute_floor_s(costs: ModelCosts, workload: Workload, ceilings: Ceilings, dtype: str) -> float | None:
    """Least time of all of a workload's operations, in seconds; None without a GEMM rate in that dtype.

    Shared prefixes count once per request: for w4, an engine that shares them may beat this.
    """
    rate = ceilings.best_flops(dtype)
    return None if rate is None else workload_flops(costs, workload) / rate


def workload_flops(costs: ModelCosts, workload: Workload) -> int:
    """Operations of all requests."""
    lengths = zip(workload.prompt_lens, workload.output_lens, strict=True)
    return sum(costs.sequence_flops(prompt, output) for prompt, output in lengths)


def jax_ceilings(dtypes: tuple[str, ...]) -> Ceilings:
    """Reading with, and products through, XLA on the default device."""
    numbers = jnp.ones(READ_BYTES // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    read = READ_BYTES / fastest(lambda: total(numbers).block_until_ready())
    product, rates = jax.jit(jnp.matmul), {}
    for dtype in dtypes:
        square = jnp.ones((GEMM_SIZE, GEMM_SIZE), dtype)
        rates[f"jax {dtype}"] = gemm_rate(lambda square=square: product(square, square).block_until_ready())
    return Ceilings({"jax": read}, rates)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def model_config(model: str) -> ModelConfig:
    """The config behind a model reference."""
    environment = Environment.read()
    options = FetchOptions(cache_dir=environment.cache_dir, offline=environment.offline, hf_token=environment.hf_token)
    return read_config(resolve_model(model, options).path)


def describe_ceilings(ceilings: Ceilings) -> list[str]:
    """One line per ceiling."""
    lines = [f"memory read, {name}: {rate / 1e9:.1f} GB/s" for name, rate in ceilings.read_bytes_per_s.items()]
    return lines + [f"GEMM, {name}: {rate / 1e9:.0f} GFLOP/s" for name, rate in ceilings.flops_per_s.items()]


def main() -> None:
    """Measure this machine and print every workload's floor."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description="Ceilings and floors.")
    parser.add_argument("--model", default="demo", help="model reference (default: demo)")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(ITEM_BYTES), help="default: bfloat16")
    args = parser.parse_args()
    costs = ModelCosts.of(model_config(args.model), args.dtype)
    ceilings = numpy_ceilings(num_cores()).merged(jax_ceilings((args.dtype,)))
    print(*describe_ceilings(ceilings), sep="\n")
    for workload in WORKLOADS.values():
        if workload.streamed:
            seconds = decode_floor_s(costs, workload, ceilings) or 0.0
            print(f"{workload.name}: at least {seconds * 1e3:.2f} ms per output token (bytes / bandwidth)")
        else:
            seconds = compute_floor_s(costs, workload, ceilings, args.dtype) or 0.0
            tera = workload_flops(costs, workload) / 1e12
            print(f"{workload.name}: at least {seconds:.2f} s ({tera:.2f} TFLOP / GEMM rate)")


if __name__ == "__main__":
    main()
