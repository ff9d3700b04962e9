"""`deterministic=True`: tokens and log-probabilities are the same bits, whatever else happens in the engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.errors import ConfigError
from engine.outputs import RequestOutput
from pallas_kernels import native
from tests.engine import test_invariance as invariance
from tests.engine.helpers import SMALL, TINY, chosen_logprobs, parts_of, prompt_logprobs, tokens_of

needs_compiler = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

# Every request also asks for its log-probabilities, so that all bits are seen.
CASES = [
    invariance.Case(c.prompt, c.params if c.params.logprobs is not None else c.params.replace(logprobs=0))
    for c in invariance.CASES
]
SCHEDULES = (
    invariance.Schedule(),
    invariance.Schedule(max_num_batched_tokens=4, spare_blocks=0),
    invariance.Schedule(max_num_batched_tokens=7, overlap=False, spare_blocks=1, prefix_caching=False),
    invariance.Schedule(max_num_seqs=2, threshold=3, policy="priority"),
)


def engines_of(dtype: str, cache: str, **settings: Any) -> list[Engine]:
    """Two engines with other buckets and other blocks."""
    every = {**SMALL, "dtype": dtype, "compilation_cache_dir": cache, "max_logprobs": -1, "deterministic": True}
    return [Engine(str(TINY / "llama"), **{**every, **static, **settings}) for static in invariance.STATIC.values()]


def bits_of(output: RequestOutput) -> list[Any]:
    """All that must be the same."""
    found: list[Any] = [tokens_of(output), *(chosen_logprobs(c).tobytes() for c in output.outputs)]
    if output.prompt_logprobs is not None:
        found.append(prompt_logprobs(output).tobytes())
    return found


SLOW = pytest.mark.slow


@needs_compiler
@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=SLOW), "bfloat16", pytest.param("float16", marks=SLOW)]
)
def test_every_bit_is_the_same(dtype: str, compilation_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under other batch mates, chunks, preemptions and cache hits, in other buckets and blocks, and in a new engine."""
    monkeypatch.setattr(invariance, "CASES", CASES)
    engines, rng = engines_of(dtype, compilation_cache), np.random.default_rng(1)
    parts = parts_of(engines[0])
    alone = [
        bits_of(invariance.run(invariance.make_core(parts, invariance.ALONE), parts, [number], [0])[0])
        for number in range(len(CASES))
    ]
    num_preemptions = 0
    for engine in engines:
        parts = parts_of(engine)
        for schedule in SCHEDULES:
            core = invariance.make_core(parts, schedule)
            chosen = rng.permutation([*range(len(CASES))] * 2).tolist()
            outputs = invariance.run(core, parts, chosen, rng.integers(0, 3, len(chosen)).tolist())
            assert [bits_of(output) for output in outputs] == [alone[number] for number in chosen]
            num_preemptions += core.scheduler.stats().num_preemptions
    assert num_preemptions > 10


@needs_compiler
@pytest.mark.slow
def test_without_it_bits_differ(compilation_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr(invariance, "CASES", CASES)
    settings = {"deterministic": False, "matmul_implementation": "xla", "attention_implementation": "xla"}
    parts = parts_of(engines_of("float32", compilation_cache, **settings)[0])
    many = range(len(CASES))
    together = invariance.run(invariance.make_core(parts, invariance.Schedule()), parts, many, [0] * len(many))
    alone = [invariance.run(invariance.make_core(parts, invariance.ALONE), parts, [number], [0])[0] for number in many]
    assert [bits_of(output) for output in together] != [bits_of(output) for output in alone]


@needs_compiler
@pytest.mark.slow
def test_of_a_real_vocabulary_too() -> None:
    """SmolLM2-135M: 49,152 tokens, sums over rows longer than any cache."""
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=12, logprobs=2, ignore_eos=True, seed=1)
    prompts = [f"{number} and {number + 1} make" for number in range(8)]
    with Engine("demo", deterministic=True, max_num_seqs=8, max_model_len=64, show_progress=False) as engine:
        together = engine.generate(prompts, params)
        alone = [engine.generate([prompt], params)[0] for prompt in prompts]
    assert [bits_of(output) for output in together] == [bits_of(output) for output in alone]


@pytest.mark.parametrize("name", ["attention_implementation", "matmul_implementation"])
def test_other_implementations_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"deterministic=True needs {name}='auto' or 'native_cpu', got 'xla'"):
        Engine(str(TINY / "llama"), deterministic=True, **{name: "xla"})


def test_without_a_compiler_it_is_refused(compilation_cache: str) -> None:
    settings = {**SMALL, "compilation_cache_dir": compilation_cache, "cpu_compiler": ""}
    with pytest.raises(ConfigError, match="deterministic=True cannot be had here: no C\\+\\+ compiler is configured"):
        Engine(str(TINY / "llama"), deterministic=True, **settings)


def test_a_named_kernel_that_cannot_run_is_one_clear_error(compilation_cache: str) -> None:
    settings = {**SMALL, "compilation_cache_dir": compilation_cache, "attention_implementation": "mosaic_gpu"}
    with pytest.raises(ConfigError, match="paged_attention: mosaic_gpu"):
        Engine(str(TINY / "llama"), **settings)
