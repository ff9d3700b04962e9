"""Quantized weights through the whole engine: smaller, nearly the same answers, the same whatever the schedule."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import ConfigError, UnsupportedModelError
from engine.sampling_params import SamplingParams
from pallas_kernels.native import library
from tests.engine.conftest import EngineShelf, MakeEngine
from tests.engine.helpers import GOLDEN_SETTINGS, TINY, golden_prompts, parts_of, prompt_logprobs, tokens_of
from tests.engine.test_invariance import ALONE, CASES, Schedule, make_core, run

# Mean difference of a prompt's logprobs to the float32 model's. The tiny models' random weights make it large: real
# ones are held to more in test_quantized_demo.py. Seen: 0.061, 0.107, 0.289 and 0.830; with float32 weights 3e-6.
TOLERANCE = {"int8": 0.08, "int8_w8a8": 0.13, "fp8": 0.35, "int4": 1.0}
# Every way through the product: weights alone, and 8-bit floats and integers on both sides.
INVARIANT = ("int8", "fp8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int4", "int8_w8a8")))
SETTINGS = {"max_num_batched_tokens": 24, "block_size": 8, "max_logprobs": -1}


def mean_difference(make_engine: MakeEngine, model: str, scheme: str) -> float:
    engine = make_engine(model, **GOLDEN_SETTINGS, quantization=scheme)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    golden = golden_prompts(TINY / model)
    found = [prompt_logprobs(output) for output in engine.generate([g.prompt for g in golden], params)]
    expected = [g.logprobs[: len(f)] for f, g in zip(found, golden, strict=True)]
    return float(np.abs(np.concatenate(found) - np.concatenate(expected)).mean())


@pytest.mark.parametrize("scheme", TOLERANCE)
def test_logprobs_stay_close(scheme: str, make_engine: MakeEngine) -> None:
    mean = mean_difference(make_engine, "llama", scheme)
    print(f"{scheme}: {mean:.4f}")
    assert 1e-3 < mean <= TOLERANCE[scheme], "not quantized at all, or quantized wrongly"


@pytest.mark.parametrize("model", ["llama_bias", "qwen3"])
def test_biases_and_head_norms(model: str, make_engine: MakeEngine) -> None:
    """Tied head and biases; a norm of each head: none of them is packed."""
    mean = mean_difference(make_engine, model, "int8")
    print(f"{model}: {mean:.4f}")
    assert 1e-3 < mean <= TOLERANCE["int8"]


@pytest.mark.parametrize("scheme", INVARIANT)
def test_schedules_change_nothing(scheme: str, shelf: EngineShelf) -> None:
    """Each request alone and whole; then all together in chunks, with prefixes found in the cache, and preempted."""
    greedy = [number for number, case in enumerate(CASES) if case.params.temperature == 0]
    parts = parts_of(shelf.take(**SETTINGS, quantization=scheme))
    alone = [run(make_core(parts, ALONE), parts, [number], [0])[0] for number in greedy]
    assert sum(len(c.token_ids) for output in alone for c in output.outputs) > 80
    core = make_core(parts, Schedule(spare_blocks=1000))
    for schedule in (core, core, make_core(parts, Schedule(spare_blocks=0)), make_core(parts, Schedule(threshold=3))):
        outputs = run(schedule, parts, greedy, [0, 1, *[0] * (len(greedy) - 2)])
        for output, expected in zip(outputs, alone, strict=True):
            assert tokens_of(output) == tokens_of(expected)


def test_the_ledger_counts_packed_weights(make_engine: MakeEngine) -> None:
    """One byte a number and four a scale of each output, instead of four a number."""
    full, small = (
        parts_of(make_engine("llama", **GOLDEN_SETTINGS, **settings)) for settings in ({}, {"quantization": "int8"})
    )
    config = full.model
    model, ffn, qkv = config.hidden_size, config.intermediate_size, config.q_size + 2 * config.kv_size
    matrices = ((model, qkv), (config.q_size, model), (model, 2 * ffn), (ffn, model))
    saved = config.num_layers * sum(3 * k * n - 4 * n for k, n in matrices)
    assert full.ledger.weights - small.ledger.weights == saved
    assert (full.describe()["quantization"], small.describe()["quantization"]) == (
        None,
        "int8 (w8a16, a scale per output: qkv, o, gate_up, down)",
    )


def test_the_implementation_is_named(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", **GOLDEN_SETTINGS, quantization="int8", matmul_implementation="reference")
    assert engine.describe()["implementations"]["quantized_matmul"].startswith("reference")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = [g.prompt for g in golden_prompts(TINY / "llama")]
    automatic = make_engine("llama", **GOLDEN_SETTINGS, quantization="int8")
    assert [tokens_of(o) for o in engine.generate(prompts, params)] == [
        tokens_of(o) for o in automatic.generate(prompts, params)
    ]


def test_what_cannot_be_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match="matmul_implementation='mosaic_gpu' is of products with quantized weights"):
        make_engine("llama", matmul_implementation="mosaic_gpu")
    with pytest.raises(UnsupportedModelError, match="quantization='fp8_block'.* has 64 of them.*int8.*int4_g32"):
        make_engine("llama", quantization="fp8_block")


def test_without_a_compiler_products_run_on_xla(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_settings", library.Settings())  # what an engine configures stays: put it back
    engine = make_engine("llama", **GOLDEN_SETTINGS, quantization="int4_g32", cpu_compiler="")
    chosen = engine.describe()["implementations"]["quantized_matmul"]
    assert chosen.startswith("xla (") and "no C++ compiler is configured" in chosen
