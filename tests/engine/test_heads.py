"""Heads in the engine: good guesses are used. That no guess changes an answer: test_device_drafts.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.engine import Engine
from engine.sampling_params import SamplingParams
from tests.engine.conftest import EngineShelf
from tests.engine.helpers import SMALL, parts_of
from tests.engine.speculation import HEADS, NUM_DRAFTS
from tests.models.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.models.tiny_heads import Tensors, eagle3_random, eagle_random, eagle_raw, medusa_random


def spec(method: str, path: Path, **changes: Any) -> str:
    """A `speculative_config`."""
    config = {"method": method, "model": str(path), "num_speculative_tokens": NUM_DRAFTS, "adaptive": False}
    return json.dumps(config | changes)


METHODS = [pytest.param(method, marks=pytest.mark.slow) for method in HEADS]
FEW = {"max_num_seqs": 1, "max_num_batched_tokens": 8, "num_gpu_blocks_override": 64}  # executables


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
