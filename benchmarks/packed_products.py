"""What products with packed weights cost on a CPU, beside dense ones: `python -m benchmarks.packed_products`.

A step's products one after the other, each waiting for the one before, with more weights than the caches hold; dense
weights and packed ones in turn in one process. Printed are ratios of the times to dense weights': of the smallest ones
and the median of those of one turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.markdown import table
from engine.config import Environment
from pallas_kernels import native
from pallas_kernels.matmul import matmul
from pallas_kernels.quantized_matmul import QuantizedWeight, from_dense, quantized_matmul

# (K, N) of a step's products. 12 layers of SmolLM2-135M: 85 MB in bfloat16.
SHAPES = {
    "SmolLM2-135M": ((576, 960), (576, 576), (576, 3072), (1536, 576)) * 12,
    "4096x4096": ((4096, 4096),) * 4,
}
MAGNITUDE = 1e-8  # of what a product adds to the next one's activations: enough to have to wait for it


@dataclass(frozen=True)
class Format:
    """How weights are packed; fields as in `from_dense`, and whether an offset is added to the weights of a group."""

    kind: str
    group_size: int = -1
    zero_points: bool = False
    scale_dtype: str = "bfloat16"
    offsets: bool = False


FORMATS = {
    "int8": Format("w8a16"),
    "int8, group 64": Format("w8a16", 64),
    "int4": Format("w4a16"),
    "int4, group 64": Format("w4a16", 64),
    "int4, group 64, zero points": Format("w4a16", 64, True),
    "int4, group 32": Format("w4a16", 32),
    "fp8": Format("w8a16_fp8"),
    "fp8 x fp8": Format("w8a8_fp8"),
    "fp8 x fp8, group 64": Format("w8a8_fp8", 64),
    "int8 x int8": Format("w8a8"),
    "int8 x int8, group 64": Format("w8a8", 64),
    "Q8_0": Format("w8a16", 32, False, "float16"),
    "Q4_0": Format("w4a16", 32, False, "float16"),
    "Q4_1": Format("w4a16", 32, True, "float16", True),
}


def step(product: Callable[[jax.Array, Any], jax.Array], shapes: Sequence[tuple[int, int]]) -> Callable[..., jax.Array]:
    """A jitted function of activations and weights: all products, one after the other."""

    def run(x: jax.Array, weights: list[Any]) -> jax.Array:
        total = jnp.zeros((x.shape[0], 1), x.dtype)
        for (k, _), weight in zip(shapes, weights, strict=True):
            y = product(x[:, :k], weight)
            total = total + y.sum(-1, keepdims=True)
            x = x + total * MAGNITUDE
        return total

    return jax.jit(run)


def pack(weight: jax.Array, form: Format) -> QuantizedWeight:
    """`weight`, rounded; offsets are of zeros, which costs the same."""
    packed = from_dense(
        weight, form.kind, form.group_size, zero_points=form.zero_points, scale_dtype=jnp.dtype(form.scale_dtype)
    )
    return replace(packed, offsets=jnp.zeros_like(packed.scales)) if form.offsets else packed


def measure(
    model: str, rows: int, dtype: str, implementations: Sequence[str], turns: int, forms_asked: dict[str, Format]
) -> dict[str, list[float]]:
    """Seconds of each turn of each form, by its name; "dense" is one of them."""
    shapes, rng = SHAPES[model], np.random.default_rng(0)
    dense = [jnp.asarray(rng.standard_normal(s) * s[0] ** -0.5, jnp.float32) for s in shapes]
    x = jnp.asarray(rng.standard_normal((rows, max(k for k, _ in shapes))), dtype)
    forms: dict[str, tuple[Callable[..., jax.Array], list[Any]]] = {
        "dense": (step(lambda x, w: matmul(x, w), shapes), [w.astype(dtype) for w in dense])
    }
    for name, form in forms_asked.items():
        packed = [pack(w, form) for w in dense]
        for implementation in implementations:

            def product(x: jax.Array, w: QuantizedWeight, implementation: str = implementation) -> jax.Array:
                return quantized_matmul(x, w, implementation=implementation)

            forms[f"{name}: {implementation}"] = (step(product, shapes), packed)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(turns + 1):  # the first one compiles
        for name, (run, weights) in forms.items():
            started = time.perf_counter()
            run(x, weights).block_until_ready()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, str]:
    """ "smallest, median" of each form to dense."""
    dense = times["dense"]
    return {
        name: f"{min(own) / min(dense):.2f}, {statistics.median(a / b for a, b in zip(own, dense, strict=True)):.2f}"
        for name, own in times.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse flags, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="SmolLM2-135M")
    parser.add_argument("--rows", default="1,4,16,64,512")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--implementations", default="native_cpu,xla")
    parser.add_argument("--formats", default=",,".join(FORMATS), help="names between ',,' (default: all)")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args(arguments)
    native.configure(Environment.read().cache_dir / "native")
    rows = [int(m) for m in options.rows.split(",")]
    asked = {name: FORMATS[name] for name in options.formats.split(",,")}
    names = options.implementations.split(",")
    found = [measure(options.model, m, options.dtype, names, options.turns, asked) for m in rows]
    cells = [ratios(times) for times in found]
    print(f"{options.model}, {options.dtype}, {options.turns} turns\n")
    lines = [["dense, ms", *(f"{min(times['dense']) * 1e3:.1f}" for times in found)]]
    lines += [[name, *(cell[name] for cell in cells)] for name in cells[0] if name != "dense"]
    print(table(["", *(f"M={m}" for m in rows)], lines))


if __name__ == "__main__":
    main()
