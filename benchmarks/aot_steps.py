"""Whole steps of real models, compiled for a GPU from shapes alone; no weight is made and no GPU is needed.

python -m benchmarks.aot_steps [--layers N]     prints a table in Markdown (docs/measurements/h200-aot.md)
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from engine.runtime.buckets import Bucket
from engine.runtime.executables import ModelProgram
from engine.runtime.limits import RuntimeLimits
from models.config import ModelConfig
from models.decoder import Decoder
from models.functional import FunctionalModel
from models.registry import resolve_family
from pallas_kernels import paged_attention
from pallas_kernels.aot import AotUnavailableError, Compiled, compile_lowered, relaunch
from pallas_kernels.device import H200
from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.paged_attention import AttentionProblem

# As in the models' own config.json, fields without influence on the program left out.
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": 128001,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 28,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": 151645,
    },
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
    },
}
SHAPES = {"decode": (64, 64), "prefill": (2048, 1)}  # tokens and sequences, of which the engine makes a bucket
PAGE_SIZE = 16
NUM_PAGES = 32768  # so many that a copy of one layer's pages is more than all other temporaries


def model_config(name: str, num_layers: int | None = None) -> ModelConfig:
    """A model's config by the families' own translation; with fewer layers if asked for."""
    raw = CONFIGS[name]
    config = resolve_family(raw["architectures"]).translate(raw, {})
    return config if num_layers is None else replace(config, layers=config.layers[:num_layers])


def program_of(config: ModelConfig, implementation: str, *, max_num_seqs: int = 256) -> ModelProgram:
    """The engine's program of a model, as `engine.builder` puts it together, in bfloat16."""
    dtype = "bfloat16"
    limits = RuntimeLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=8192,
        max_model_len=min(config.max_position_embeddings, 32768),
        block_size=PAGE_SIZE,
        dtype=dtype,
        kv_dtype=dtype,
    )
    problem = AttentionProblem(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=PAGE_SIZE,
        dtype=dtype,
        kv_dtype=dtype,
        implementation=implementation,
    )
    cache = KVLayout(NUM_PAGES, config.num_kv_heads, PAGE_SIZE, config.head_dim, dtype)
    return ModelProgram(FunctionalModel(lambda: Decoder(config, problem, dtype=dtype)), config, limits, cache)


@dataclass(frozen=True)
class Step:
    """A compiled step and what it was compiled from."""

    program: ModelProgram
    bucket: Bucket
    compiled: Compiled

    @property
    def is_in_place(self) -> bool:
        """Whether all state that goes in donated comes out where it was."""
        return self.compiled.memory.aliased == state_bytes(self.program)


def compile_step(name: str, kind: str, implementation: str, num_layers: int | None = None) -> Step:
    """Compile a forward pass for an H200.

    Args:
        kind: of `SHAPES`.
        implementation: of attention.
    """
    program = program_of(model_config(name, num_layers), implementation)
    bucket = program.buckets.choose(*SHAPES[kind])
    return Step(program, bucket, compile_lowered(H200, lambda: lower_step(program, bucket), with_thunks=True))


def lower_step(program: ModelProgram, bucket: Bucket) -> jax.stages.Lowered:
    """The forward pass of one bucket; call for a device, inside `compile_lowered`."""
    params = {name: jax.ShapeDtypeStruct(s.shape, s.dtype) for name, s in program.model.shapes.items()}
    return program.lower_forward(bucket, params)


def state_bytes(program: ModelProgram) -> int:
    """Bytes of the donated state."""
    state, _ = program.state_shapes()
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))


def page_bytes(program: ModelProgram) -> int:
    """Bytes of one layer's pages."""
    return program.cache.page_bytes * program.cache.num_pages


COLUMNS = (
    *("model", "layers", "step", "attention", "launches", "in place"),
    *("temporaries (MiB)", "kernels", "lower (s)", "compile (s)"),
)


def _row(name: str, kind: str, implementation: str, num_layers: int | None) -> str:
    step = compile_step(name, kind, implementation, num_layers)
    compiled, bucket = step.compiled, step.bucket
    kinds = Counter(thunk.removeprefix("k") for thunk in compiled.thunks)
    columns = (
        name,
        str(len(step.program.config.layers)),
        f"{bucket.num_tokens} tokens, {bucket.num_seqs} sequences",
        implementation,
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "yes" if step.is_in_place else "no",
        f"{compiled.memory.temporaries / 2**20:.1f}",
        str(len(compiled.kernels)),
        f"{compiled.lower_s:.1f}",
        f"{compiled.compile_s:.1f}",
    )
    return f"| {' | '.join(columns)} |"


def main(arguments: Sequence[str]) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot_steps", description="steps compiled for an H200")
    parser.add_argument("--layers", type=int, default=None, help="cut models down to so many layers")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.inside:
        try:
            return relaunch("benchmarks.aot_steps", [*arguments, "--inside"])
        except AotUnavailableError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    names = [i.name for i in paged_attention.OP.implementations if i.name in ("mosaic_gpu", "xla")]
    for implementation in names:
        for name in CONFIGS:
            for kind in SHAPES:
                print(_row(name, kind, implementation, options.layers), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
