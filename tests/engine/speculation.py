"""What tests of speculation share: requests, methods by name, random schedules, and steps that draft now and then."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from engine.built import BuiltEngine
from engine.core import EngineCore
from engine.outputs import RequestOutput
from engine.requests.sequence import Sequence as EngineSequence
from engine.runtime.speculation import make_speculator
from engine.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from engine.speculative.protocol import AnySpeculator
from tests.engine.helpers import TINY, random_ids
from tests.engine.test_invariance import ALONE, Case, Schedule, make_core, require_same, run
from tests.engine.test_invariance import CASES as WITHOUT_GRAMMAR
from tests.models.tiny_checkpoints import write_checkpoint
from tests.models.tiny_heads import Tensors, eagle3_random, eagle_random, eagle_raw, medusa_random

NUM_DRAFTS = 3
EXECUTABLES: dict[str, Any] = {"max_num_batched_tokens": 24, "block_size": 8, "max_logprobs": -1}
TARGET_RAW = json.loads((TINY / "llama" / "config.json").read_text())
TAPS = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}}
HEADS = ("medusa", "eagle", "eagle3")

# A model that guesses for itself is always right, one of other weights hardly ever.
METHODS: dict[str, dict[str, Any]] = {
    "layer_skip": {"method": "layer_skip", "layers": [1]},
    "packed": {"method": "layer_skip", "quantization": "int8_w8a8"},
    "same_model": {"method": "draft_model", "model": str(TINY / "llama")},
    "other_model": {"method": "draft_model", "model": str(TINY / "llama_bias")},
    "int8_weights": {"method": "draft_model", "model": str(TINY / "llama"), "quantization": "int8"},
    **{method: {"method": method} for method in HEADS},
}


def grammar_cases() -> list[Case]:
    """Requests that follow a grammar: greedy and drawn, several completions, stop strings, penalties, long prompts."""
    rng = np.random.default_rng(20261125)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["a"]}
    wishes: list[dict[str, Any]] = [
        {"temperature": 0.0, "structured_outputs": StructuredOutputsParams(regex="(ab|cd){2,6}")},
        {"temperature": 1.0, "n": 2, "structured_outputs": StructuredOutputsParams(regex="[a-f]{4,20}")},
        {"temperature": 1.0, "structured_outputs": StructuredOutputsParams(json=json.dumps(schema))},
        {"temperature": 0.9, "stop": ["c"], "structured_outputs": StructuredOutputsParams(regex="[a-d ]{3,24}")},
        {
            "temperature": 0.0,
            "frequency_penalty": 0.7,
            "logprobs": 2,
            "structured_outputs": StructuredOutputsParams(choice=["abacus", "abdomen", "bacon"]),
        },
    ]
    kind, cases = RequestOutputKind.FINAL_ONLY, []
    for index, wish in enumerate(wishes):
        params = SamplingParams(max_tokens=20, seed=2000 + index, output_kind=kind, **wish)
        cases.append(Case(random_ids(rng, 5 + 11 * index), params))
    return cases


CASES = [*WITHOUT_GRAMMAR, *grammar_cases()]


def random_head(method: str, target: Mapping[str, Any] = TARGET_RAW) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors of heads that guess at random.

    Args:
        method: one of `HEADS`.
        target: `config.json` of the model that they are for.
    """
    size, vocab = target["hidden_size"], target["vocab_size"]
    if method == "medusa":
        return {"medusa_num_heads": NUM_DRAFTS, "medusa_num_layers": 1}, medusa_random(size, vocab, NUM_DRAFTS, 1)
    raw = eagle_raw(target, num_attention_heads=2, head_dim=8)
    if method == "eagle":
        return raw, eagle_random(raw)
    raw |= {"draft_vocab_size": 100} | TAPS
    return raw, eagle3_random(raw, size)


def config_of(method: str, heads: Path, **changes: Any) -> str:
    """A `speculative_config` that drafts in every step.

    Args:
        method: one of `METHODS`.
        heads: directory under which random heads are written.
        changes: other keys.
    """
    config = {**METHODS[method], "num_speculative_tokens": NUM_DRAFTS, "adaptive": False}
    if method in HEADS:
        path = heads / method
        if not path.exists():
            path.mkdir()
            write_checkpoint(path, *random_head(method))
        config["model"] = str(path)
    return json.dumps(config | changes)


def sometimes(speculator: AnySpeculator, share: float, seed: int) -> AnySpeculator:
    """Drafts in some steps only, so that steps without follow while others are in flight, and drafters fall behind."""
    rng, pays = np.random.default_rng(seed), speculator.pays

    def maybe(sequences: list[EngineSequence]) -> bool:
        return bool(rng.random() < share) and pays(sequences)

    speculator.pays = maybe  # type: ignore[method-assign]
    return speculator


def guessing(parts: BuiltEngine, schedule: Schedule, share: float, seed: int) -> EngineCore:
    """As `make_core`, with the engine's own way to guess, in `share` of the steps."""
    core, settings = make_core(parts, schedule), parts.config.speculative.settings
    speculator = make_speculator(settings, parts.core.executor)
    assert speculator is not None
    core._speculator = sometimes(speculator, share, seed)
    return core


def each_alone(parts: BuiltEngine, cases: Sequence[Case] = tuple(CASES)) -> list[RequestOutput]:
    """What each case gives by itself in an engine that does not speculate."""
    return [run(make_core(parts, ALONE), parts, [number], [0], cases)[0] for number in range(len(cases))]


@dataclass(frozen=True)
class Arrival:
    """A request of a workload.

    Attributes:
        number: of its case.
        gap: steps since the arrival before.
        life: steps until it is aborted; None = never.
    """

    number: int
    gap: int = 0
    life: int | None = None


schedules = st.builds(
    Schedule,
    max_num_seqs=st.sampled_from([4, 3, 2, 1]),
    max_num_batched_tokens=st.sampled_from([5, 9, 24, 24]),
    threshold=st.sampled_from([0, 3]),
    prefix_caching=st.booleans(),
    overlap=st.booleans(),
    spare_blocks=st.sampled_from([0, 0, 2, 50]),
    policy=st.sampled_from(["fcfs", "priority"]),
)
workloads = st.lists(
    st.builds(
        Arrival,
        st.integers(0, len(CASES) - 1),
        st.sampled_from([0, 0, 1, 5]),
        st.sampled_from([None, None, None, None, None, None, 2, 15, 30]),
    ),
    min_size=3,
    max_size=8,
)
shares = st.sampled_from([1.0, 0.6])
seeds = st.integers(0, 99)


def require_same_as_alone(
    core: EngineCore,
    parts: BuiltEngine,
    workload: Sequence[Arrival],
    alone: Sequence[RequestOutput] | Mapping[int, RequestOutput],
) -> None:
    """Run a workload: all tokens, texts, reasons and logprobs are those of each case alone; those of an aborted request
    as far as it came.

    Raises:
        AssertionError: something differs, or is left in the core.
    """
    numbers, gaps = [arrival.number for arrival in workload], [arrival.gap for arrival in workload]
    outputs = run(core, parts, numbers, gaps, CASES, [arrival.life for arrival in workload])
    for arrival, output in zip(workload, outputs, strict=True):
        expected = alone[arrival.number]
        if all(completion.finish_reason != "abort" for completion in output.outputs):
            require_same(output, expected)
            continue
        assert arrival.life is not None, "aborted by nobody"
        for found, whole in zip(output.outputs, expected.outputs, strict=True):
            if found.finish_reason != "abort":
                assert (found.token_ids, found.finish_reason) == (whole.token_ids, whole.finish_reason)
            assert found.token_ids == whole.token_ids[: len(found.token_ids)]
            # What an abort leaves of a character of several tokens is shown as U+FFFD.
            assert whole.text.startswith(found.text.rstrip("\ufffd"))
