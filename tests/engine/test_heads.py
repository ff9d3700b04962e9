"""Heads in the engine: the answers are those without, whatever the heads guess; and good guesses are used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.builder import BuiltEngine
from engine.core import EngineCore
from engine.engine import Engine
from engine.errors import ConfigError, QuireError
from engine.outputs import RequestOutput
from engine.requests.sequence import Sequence as EngineSequence
from engine.sampling_params import SamplingParams
from engine.speculative.device import DeviceSpeculator
from tests.engine.conftest import EngineShelf
from tests.engine.helpers import SMALL, TINY, parts_of
from tests.engine.test_invariance import ALONE, CASES, Schedule, make_core, require_same, run
from tests.engine.test_speculative import EXECUTABLES
from tests.models.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.models.tiny_heads import Tensors, eagle3_random, eagle_random, eagle_raw, medusa_random

NUM_DRAFTS = 3
TARGET = TINY / "llama"
TARGET_RAW = json.loads((TARGET / "config.json").read_text())
SIZE, VOCAB = TARGET_RAW["hidden_size"], TARGET_RAW["vocab_size"]
TAPS = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}}


def random_head(method: str) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors of heads that guess at random."""
    raw = eagle_raw(TARGET_RAW, num_attention_heads=2, head_dim=8)
    if method == "eagle":
        return raw, eagle_random(raw)
    if method == "eagle3":
        raw |= {"draft_vocab_size": 100} | TAPS
        return raw, eagle3_random(raw, SIZE)
    return {"medusa_num_heads": NUM_DRAFTS, "medusa_num_layers": 1}, medusa_random(SIZE, VOCAB, NUM_DRAFTS, 1)


def spec(method: str, path: Path, **changes: Any) -> str:
    """A `speculative_config`."""
    config = {"method": method, "model": str(path), "num_speculative_tokens": NUM_DRAFTS, "adaptive": False}
    return json.dumps(config | changes)


METHODS = [pytest.param(method, marks=pytest.mark.slow) for method in ("medusa", "eagle", "eagle3")]
FEW = {"max_num_seqs": 1, "max_num_batched_tokens": 8, "num_gpu_blocks_override": 64}  # executables


@pytest.fixture(scope="module", params=METHODS)
def parts(request: pytest.FixtureRequest, shelf: EngineShelf, tmp_path_factory: pytest.TempPathFactory) -> BuiltEngine:
    """An engine with random heads."""
    path = write_checkpoint(tmp_path_factory.mktemp("head"), *random_head(request.param))
    return parts_of(shelf.take(**EXECUTABLES, speculative_config=spec(request.param, path)))


@pytest.fixture(scope="module")
def alone(shelf: EngineShelf) -> list[RequestOutput]:
    """What each case gives by itself in an engine that does not speculate."""
    plain = parts_of(shelf.take(**EXECUTABLES))
    return [run(make_core(plain, ALONE), plain, [number], [0])[0] for number in range(len(CASES))]


class Fickle(DeviceSpeculator):
    """Drafts in some steps only, so that steps without follow while others are in flight."""

    def __init__(self, share: float, seed: int) -> None:
        super().__init__(NUM_DRAFTS, None, 64, lambda sequence: False, lambda sequence: None)
        self.share, self.rng = share, np.random.default_rng(seed)

    def pays(self, sequences: list[EngineSequence]) -> bool:
        return self.rng.random() < self.share and super().pays(sequences)


def guessing(parts: BuiltEngine, schedule: Schedule, share: float, seed: int) -> EngineCore:
    """As `make_core`, with the engine's heads."""
    core = make_core(parts, schedule)
    core._speculator = Fickle(share, seed)
    return core


def test_preempted_again_and_again(parts: BuiltEngine, alone: list[RequestOutput]) -> None:
    """Every parameter, chunked prompts, hits of the prefix cache, steps planned ahead, blocks taken away."""
    core = guessing(parts, Schedule(spare_blocks=0), 0.7, 1)
    outputs = run(core, parts, range(len(CASES)), [0] * len(CASES))
    for output, expected in zip(outputs, alone, strict=True):
        require_same(output, expected)
    assert core.scheduler.stats().num_preemptions > 0
    assert core.stats.num_draft_tokens > 20


def test_every_parameter(parts: BuiltEngine, alone: list[RequestOutput]) -> None:
    """The same with room for all: guesses in nearly every step."""
    core = guessing(parts, Schedule(spare_blocks=200), 1.0, 1)
    outputs = run(core, parts, range(len(CASES)), [0] * len(CASES))
    for output, expected in zip(outputs, alone, strict=True):
        require_same(output, expected)
    assert core.stats.num_draft_tokens > 200
    assert core.stats.num_accepted_tokens < core.stats.num_draft_tokens / 2


@pytest.mark.slow
@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    schedule=st.builds(
        Schedule,
        max_num_seqs=st.integers(1, 4),
        threshold=st.sampled_from([0, 3]),
        prefix_caching=st.booleans(),
        overlap=st.booleans(),
        spare_blocks=st.sampled_from([0, 1, 3, 50]),
        policy=st.sampled_from(["fcfs", "priority"]),
    ),
    workload=st.lists(st.tuples(st.integers(0, len(CASES) - 1), st.sampled_from([0, 0, 1, 5])), min_size=1, max_size=6),
    share=st.sampled_from([0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_schedule(
    schedule: Schedule,
    workload: list[tuple[int, int]],
    share: float,
    seed: int,
    parts: BuiltEngine,
    alone: list[RequestOutput],
) -> None:
    core = guessing(parts, schedule, share, seed)
    chosen, gaps = [number for number, _ in workload], [gap for _, gap in workload]
    for number, output in zip(chosen, run(core, parts, chosen, gaps), strict=True):
        require_same(output, alone[number])


@dataclass(frozen=True)
class Cycle:
    """A model whose next token is a function of the last one, and heads that know it.

    Tokens are orthogonal vectors, layers add nothing, and the output head maps each to its successor.

    Attributes:
        raw, tensors: of the model. vectors: [V, E]. after: successor of each token.
    """

    raw: dict[str, Any]
    tensors: Tensors
    vectors: np.ndarray
    after: np.ndarray

    @classmethod
    def make(cls) -> Cycle:
        """Of 40 tokens."""
        raw = tiny_config(hidden_size=48, num_hidden_layers=3, max_position_embeddings=256)
        rng = np.random.default_rng(11)
        order = rng.permutation(40)
        after = np.empty(40, int)
        after[order] = np.roll(order, -1)
        vectors = np.linalg.qr(rng.standard_normal((48, 48)))[0][:40].astype(np.float32)
        tensors = random_tensors(raw)
        for name in tensors:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[name] = np.zeros_like(tensors[name])
        tensors["model.norm.weight"] = np.ones(48, np.float32)
        tensors["model.embed_tokens.weight"] = vectors
        made = cls(raw, tensors, vectors, after)
        tensors["lm_head.weight"] = made.head(1)
        return made

    def head(self, steps: int) -> np.ndarray:
        """[V, E], which gives the token so many places after the one whose vector comes in."""
        to = np.arange(40)
        for _ in range(steps):
            to = self.after[to]
        rows = np.empty_like(self.vectors)
        rows[to] = self.vectors
        return rows

    def heads(self, method: str) -> tuple[dict[str, Any], Tensors]:
        """Heads that are right: all guesses of Medusa and EAGLE, the first of EAGLE-3."""
        if method == "medusa":
            tensors = medusa_random(48, 40, NUM_DRAFTS, 1)
            for head in range(NUM_DRAFTS):
                tensors[f"{head}.0.linear.weight"][:] = 0
                tensors[f"{head}.0.linear.bias"][:] = 0
                tensors[f"{head}.1.weight"] = self.head(2 + head)
            return {"medusa_num_heads": NUM_DRAFTS, "medusa_num_layers": 1}, tensors
        taps = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]} if method == "eagle3" else {}
        raw = eagle_raw(self.raw, **taps)
        tensors = eagle3_random(raw, 48) if method == "eagle3" else eagle_random(raw)
        for name in tensors:
            if name.endswith(("o_proj.weight", "down_proj.weight", "fc.bias")):
                tensors[name][:] = 0
        # EAGLE goes on from the token's vector, EAGLE-3 from that of the stream, which is the token before.
        tensors["fc.weight"] = np.eye(48, tensors["fc.weight"].shape[1], dtype=np.float32)
        if method == "eagle3":
            tensors["norm.weight"][:], tensors["lm_head.weight"] = 1, self.head(2)
        return raw, tensors


@pytest.mark.parametrize("method", METHODS)
def test_right_guesses_are_used(shelf: EngineShelf, tmp_path: Path, method: str) -> None:
    """Greedy and drawn, in fewer steps, with the tokens that the model gives by itself."""
    cycle = Cycle.make()
    model = write_checkpoint(tmp_path / "model", cycle.raw, cycle.tensors)
    heads = write_checkpoint(tmp_path / "heads", *cycle.heads(method))
    every = {**SMALL, **FEW, "skip_tokenizer_init": True, "compilation_cache_dir": shelf.cache_dir}
    prompts = [[5, 9, 3], [7], list(range(3, 30))]
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    drawn = SamplingParams(max_tokens=24, temperature=0.05, seed=5, ignore_eos=True)
    asked = [greedy, drawn, greedy]
    engine = Engine(str(model), **every, speculative_config=spec(method, heads))
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected, token = [], prompt[-1]
        for _ in range(24):
            token = int(cycle.after[token])
            expected.append(token)
        assert list(output.outputs[0].token_ids) == expected
    stats = parts_of(engine).core.stats
    assert stats.num_draft_tokens > 0
    rate = (
        stats.accepted_at[0] / stats.num_drafts
        if method == "eagle3"
        else stats.num_accepted_tokens / stats.num_draft_tokens
    )
    assert rate > 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model is missing"),
        ({"method": "mtp"}, "no model family here has layers of multi-token prediction"),
        ({"quantization": "int8"}, "quantization is of method 'layer_skip' or 'draft_model' only"),
    ],
)
def test_settings_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in (json.loads(spec("eagle", tmp_path)) | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        Engine(str(TARGET), **SMALL, speculative_config=config)


def test_heads_of_another_model_are_refused(tmp_path: Path) -> None:
    """At the start, with both sizes; so are more guesses than heads."""
    raw, tensors = random_head("medusa")
    other = write_checkpoint(tmp_path, raw | {"hidden_size": 128}, tensors)
    with pytest.raises(QuireError, match=f"hidden_size is 128 .* {SIZE}"):
        Engine(str(TARGET), **SMALL, speculative_config=spec("medusa", other))
    write_checkpoint(tmp_path, raw, tensors)
    with pytest.raises(ConfigError, match="num_speculative_tokens is 4, and .* has 3 Medusa heads"):
        Engine(str(TARGET), **SMALL, speculative_config=spec("medusa", tmp_path, num_speculative_tokens=4))
