"""Whole forward passes for an H200: one CUDA graph, in place, and no copy of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

import jax
import jax.numpy as jnp
import pytest

from benchmarks.aot_steps import MODELS, PLAIN, QUANTIZED, SHAPES, Step, Stored, compile_step, page_bytes
from pallas_kernels.aot import compile_for
from pallas_kernels.aot.report import parse_entry
from pallas_kernels.device import H200
from pallas_kernels.quantized_matmul import QuantizedWeight

KERNEL = "mosaic_gpu"
FEW_LAYERS = 3  # the layers of a model are alike
IN_PLACE = ("parameter", "tuple", "get-tuple-element", "bitcast")


def copied(hlo: str, shapes: Iterable[tuple[int, ...]]) -> list[str]:
    """Instructions that make an array as large as one of the shapes, in any order of its dimensions."""
    wanted = {tuple(sorted(shape)) for shape in shapes}
    return [
        f"{opcode} makes {dtype}{list(shape)}"
        for opcode, arrays in parse_entry(hlo)
        for dtype, shape in arrays
        if opcode not in IN_PLACE and tuple(sorted(shape)) in wanted
    ]


def weight_shapes(step: Step) -> Iterator[tuple[int, ...]]:
    """Of the matrices; without those that an activation of T rows may look like."""
    for leaf in jax.tree.leaves(step.params):
        if len(leaf.shape) > 1 and step.bucket.num_tokens not in leaf.shape:
            yield leaf.shape


def check(step: Step) -> None:
    compiled, program = step.compiled, step.program
    assert compiled.violations(["HGMMA", "UTMALDG"]) == []
    assert compiled.thunks == ("kCommandBuffer",), "not one CUDA graph"
    assert step.is_in_place, "the state is not advanced in place"
    assert copied(compiled.executable.as_text(), weight_shapes(step)) == []
    assert compiled.memory.temporaries < page_bytes(program), "room for a copy of a layer's pages"
    calls = compiled.executable.as_text().count('custom_call_target="mosaic_gpu')
    assert calls % len(program.config.layers) == 0 and calls >= len(program.config.layers)
    # Fewer than a layer calls: one shape's kernel may be another's.
    assert 0 < len(compiled.kernels) <= calls // len(program.config.layers), "layers do not share their kernels"


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_step(name: str, kind: str) -> None:
    check(compile_step(name, kind, KERNEL, FEW_LAYERS))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("name", "stored"), [(name, stored) for name, all_ in QUANTIZED.items() for stored in all_])
def test_step_with_quantized_weights(name: str, stored: Stored, kind: str) -> None:
    """Packed weights go into the kernels as they are: no dequantized copy of one is made."""
    step = compile_step(name, kind, KERNEL, FEW_LAYERS, stored)
    check(step)
    packed = [weight for weight in step.params.values() if isinstance(weight, QuantizedWeight)]
    assert len(packed) == 4 * FEW_LAYERS
    largest = max(2 * weight.stored.size for weight in packed)  # bytes in bfloat16
    plain = compile_step(name, kind, KERNEL, FEW_LAYERS).compiled.memory.temporaries
    assert step.compiled.memory.temporaries < plain + largest // 2, "room for a dequantized weight"


def test_a_copy_of_a_weight_is_seen() -> None:
    def step(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x @ weight, jnp.sort(weight.astype(jnp.float32), axis=0)[3]

    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 512), (512, 1024)))
    text = compile_for(H200, step, *shapes).executable.as_text()
    assert copied(text, [(512, 1024)]) and not copied(text, [(512, 1000)])


@pytest.mark.slow
@pytest.mark.parametrize("stored", [PLAIN, *QUANTIZED["llama-3.1-8b"]], ids=str)
def test_step_of_full_depth(stored: Stored) -> None:
    step = compile_step("llama-3.1-8b", "decode", KERNEL, stored=stored)
    check(step)
    weights = sum(prod(shape.shape) for shape in step.program.model.shapes.values())
    assert 8.0e9 < weights < 8.1e9, "this is not the 8B model"
    assert step.compiled.lower_s + step.compiled.compile_s < 120
