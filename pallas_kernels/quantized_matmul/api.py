"""The signature of the product with packed weights, and its dispatch.

    weight = repack(numbers, scales, kind="w4a16", group_size=128)     # once, at load
    y = quantized_matmul(x, weight)                                    # each step

How packed weights lie in memory, and why so, says `weight.py`. On Hopper "auto" takes the kernel for weights with
groups and leaves scales per output to XLA, which fuses them, unless measured times say otherwise
(`config.prefers_xla`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.op import Implementation, Op, mosaic_gpu
from pallas_kernels.quantized_matmul import native_cpu, pallas_mosaic_gpu, reference, xla
from pallas_kernels.quantized_matmul.config import prefers_xla
from pallas_kernels.quantized_matmul.gpu_cases import gpu_cases
from pallas_kernels.quantized_matmul.problem import problem_of
from pallas_kernels.quantized_matmul.rotation import rotate
from pallas_kernels.quantized_matmul.weight import QuantizedWeight


def _everything(problem: object) -> str | None:
    del problem
    return None


OP = Op(
    name="quantized_matmul",
    implementations=(
        *mosaic_gpu(pallas_mosaic_gpu.make, pallas_mosaic_gpu.supports, prefers_xla),
        Implementation(
            "native_cpu", {"run": native_cpu.run}, native_cpu.supports, native_cpu.device_reason, native_cpu.yields
        ),
        Implementation("xla", {"run": xla.run}, _everything),
        Implementation("reference", {"run": reference.run}, _everything),
    ),
    automatic=("mosaic_gpu", "native_cpu", "xla"),
    gpu_cases=gpu_cases,
)


def quantized_matmul(
    x: jax.Array, weight: QuantizedWeight, *, out_dtype: Any = None, implementation: str = "auto"
) -> jax.Array:
    """`x @ values of the weight`, accumulated in float32 (integers by integers: int32).

    Kinds with quantized activations (w8a8, w8a8_fp8) quantize x first, per token, or per token and group if the weight
    has groups (`quantize_activations`; group size 128 with scales of 128x128 blocks is DeepSeek-V3's recipe, arXiv
    2412.19437, section 3.3): that rounding is a part of the specification.

    Args:
        x: [M, K], float.
        weight: packed [K, N].
        out_dtype: dtype of the result; default x's.
        implementation: "auto" or a name (strict).

    Returns:
        [M, N].

    Raises:
        ValueError: x does not have the weight's K columns.
    """
    if x.ndim != 2 or weight.stored.ndim != 2 or x.shape[1] != weight.k:
        raise ValueError(f"activations {x.shape} do not meet a weight packed as {weight.stored.shape} ([N, K])")
    if weight.input_order is not None:
        x, weight = jnp.take(x, weight.input_order, axis=1), replace(weight, input_order=None)
    if weight.input_limit is not None:
        x, weight = jnp.clip(x, -weight.input_limit, weight.input_limit), replace(weight, input_limit=None)
    out_dtype = out_dtype or x.dtype
    if weight.rotation:
        x, weight = rotate(x, weight.rotation), replace(weight, rotation=0)
    problem = problem_of(x, weight, out_dtype)
    chosen = OP.choose(implementation, problem)
    return chosen.functions["run"](x, weight, jnp.dtype(problem.out_dtype))
