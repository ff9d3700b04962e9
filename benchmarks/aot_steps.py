"""Whole steps of real models, compiled for a GPU from shapes alone; no weight is made and no GPU is needed.

python -m benchmarks.aot_steps [--layers N]     prints a table in Markdown (docs/measurements/h200-aot.md)
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from benchmarks.gpu.models import model_config
from engine.config import KernelConfig
from engine.runtime.buckets import Bucket
from engine.runtime.executables import ModelProgram
from engine.runtime.limits import RuntimeLimits
from models.functional import Params
from models.quantization.format import packed_struct
from models.quantization.schemes import storages_of
from pallas_kernels.aot import AotUnavailableError, Compiled, compile_lowered, relaunch
from pallas_kernels.device import H200

MODELS = ("llama-3.1-8b", "qwen3-0.6b", "smollm2-135m")
SHAPES = {"decode": (64, 64), "prefill": (2048, 1)}  # tokens and sequences, of which the engine makes a bucket
PAGE_SIZE = 16
NUM_PAGES = 32768  # so many that a copy of one layer's pages is more than all other temporaries


@dataclass(frozen=True)
class Stored:
    """What weights and keys and values are stored in; activations are bfloat16.

    Attributes:
        quantization: as of the engine's setting; None = bfloat16.
        kv_dtype: JAX's name.
    """

    quantization: str | None = None
    kv_dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.quantization or 'bf16'} / {'bf16' if self.kv_dtype == 'bfloat16' else self.kv_dtype}"


PLAIN = Stored()
# A model in storages of its own: what a user with one large model would choose between.
QUANTIZED = {"llama-3.1-8b": (Stored("int4_g128"), Stored("fp8", "float8_e4m3fn"))}


def program_of(name: str, implementation: str, num_layers: int | None = None, stored: Stored = PLAIN) -> ModelProgram:
    """The engine's program of a model in bfloat16, with fewer layers if asked for."""
    config, dtype = model_config(name), "bfloat16"
    config = config if num_layers is None else replace(config, layers=config.layers[:num_layers])
    limits = RuntimeLimits(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_model_len=min(config.max_position_embeddings, 32768),
        block_size=PAGE_SIZE,
        dtype=dtype,
        kv_dtype=stored.kv_dtype,
    )
    return ModelProgram.of(config, limits, NUM_PAGES, KernelConfig(attention_implementation=implementation))


@dataclass(frozen=True)
class Step:
    """A compiled step and what it was compiled from; `params` are shapes."""

    program: ModelProgram
    params: Params
    bucket: Bucket
    compiled: Compiled

    @property
    def is_in_place(self) -> bool:
        """Whether all state that goes in donated comes out where it was."""
        return self.compiled.memory.aliased == state_bytes(self.program)


def compile_step(
    name: str, kind: str, implementation: str, num_layers: int | None = None, stored: Stored = PLAIN
) -> Step:
    """Compile a forward pass for an H200.

    Args:
        name: of the model.
        kind: of `SHAPES`.
        implementation: of attention; products choose for themselves.
        num_layers: of the model cut down; default all.
        stored: what weights, keys and values are stored in.
    """
    program = program_of(name, implementation, num_layers, stored)
    params = shapes_of(program, stored)
    bucket = program.buckets.choose(*SHAPES[kind])
    compiled = compile_lowered(H200, lambda: program.lower_forward(bucket, params), with_thunks=True)
    return Step(program, params, bucket, compiled)


def shapes_of(program: ModelProgram, stored: Stored) -> Params:
    """Shapes of the weights."""
    storages = {} if stored.quantization is None else storages_of(program.config, stored.quantization)
    return {
        name: packed_struct(shape.shape, storages[name])
        if name in storages
        else jax.ShapeDtypeStruct(shape.shape, shape.dtype)
        for name, shape in program.model.shapes.items()
    }  # type: ignore[return-value]


def state_bytes(program: ModelProgram) -> int:
    """Bytes of the donated state."""
    state, _ = program.state_shapes()
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))


def page_bytes(program: ModelProgram) -> int:
    """Bytes of one layer's pages."""
    return program.cache.page_bytes * program.cache.num_pages


COLUMNS = (
    *("model", "layers", "weights / KV", "step", "attention", "launches", "in place"),
    *("temporaries (MiB)", "kernels", "lower (s)", "compile (s)"),
)


def _row(name: str, kind: str, implementation: str, num_layers: int | None, stored: Stored) -> str:
    step = compile_step(name, kind, implementation, num_layers, stored)
    compiled, bucket = step.compiled, step.bucket
    kinds = Counter(thunk.removeprefix("k") for thunk in compiled.thunks)
    columns = (
        name,
        str(len(step.program.config.layers)),
        str(stored),
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
    for implementation in ("mosaic_gpu", "xla"):
        for name in MODELS:
            for stored in (PLAIN, *QUANTIZED.get(name, ())) if implementation == "mosaic_gpu" else (PLAIN,):
                for kind in SHAPES:
                    print(_row(name, kind, implementation, options.layers, stored), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
