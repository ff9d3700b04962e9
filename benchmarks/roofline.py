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
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from benchmarks.ceilings import GEMM_SIZE, READ_BYTES, Ceilings, fastest, gemm_rate, numpy_ceilings
from benchmarks.workloads.cpu_smollm2 import WORKLOADS, Workload
from engine.config import Environment
from models.config import ModelConfig
from models.loading.load import read_config
from models.loading.resolver import FetchOptions, resolve_model

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelCosts:
    """What a decoder costs, from its shapes.

    Attributes:
        body_weights: elements of all matrices of the layers.
        head_weights: elements of the output head, V·E.
        kv_elements_per_token: keys and values of all layers, 2·K·D·L.
        attention_flops_per_pair: 4·H·D·L, for one query that sees one key.
        item_bytes: bytes per element.
    """

    body_weights: int
    head_weights: int
    kv_elements_per_token: int
    attention_flops_per_pair: int
    item_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: str) -> ModelCosts:
        """The costs of a model in a dtype."""
        attention = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
        mlp = 3 * config.hidden_size * config.intermediate_size
        return cls(
            body_weights=config.num_layers * (attention + mlp),
            head_weights=config.vocab_size * config.hidden_size,
            kv_elements_per_token=2 * config.kv_size * config.num_layers,
            attention_flops_per_pair=4 * config.q_size * config.num_layers,
            item_bytes=ITEM_BYTES[dtype],
        )

    def decode_bytes(self, context: float) -> float:
        """Bytes that one token of one sequence must read, at a context of so many tokens."""
        return (self.body_weights + self.head_weights + self.kv_elements_per_token * context) * self.item_bytes

    def sequence_flops(self, num_prompt: int, num_output: int) -> int:
        """Operations for one sequence: every token but the last passes the layers, only sampled ones need the head."""
        tokens = num_prompt + num_output - 1
        pairs = tokens * (tokens + 1) // 2
        head = 2 * self.head_weights * num_output
        return 2 * self.body_weights * tokens + head + self.attention_flops_per_pair * pairs


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
