"""What heads guess, whatever steps a sequence was computed in: against numpy over the whole sequence at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.config import KernelConfig
from engine.errors import ConfigError
from engine.runtime.drafting.drafter import DeviceDrafter, DraftRows
from engine.runtime.drafting.heads import Target, make_heads
from engine.runtime.limits import RuntimeLimits
from engine.runtime.packing import TokenRows
from engine.runtime.sampling.inputs import SamplerVariant, padding_params, unpack
from models.loading.load import LoadedModel, load_model
from pallas_kernels.ragged import RaggedBatch, token_positions
from tests.models.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.models.tiny_heads import (
    eagle3_random,
    eagle3_reference,
    eagle_random,
    eagle_raw,
    eagle_reference,
    medusa_random,
    norm,
    silu,
)

PAGE, BLOCKS, NUM_ROWS, NUM_DRAFTS, TOKENS, SEQS = 4, 6, 3, 3, 16, 3
RAW = tiny_config(num_hidden_layers=7)
Guess = Callable[[np.ndarray, np.ndarray], list[int]]  # (tokens, states of all but the last) -> drafts


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random decoder."""
    return load_model(write_checkpoint(tmp_path_factory.mktemp("target"), RAW, random_tensors(RAW)))


def target(loaded: LoadedModel) -> Target:
    """With small pages."""
    limits = RuntimeLimits(
        max_model_len=PAGE * BLOCKS,
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=TOKENS,
        block_size=PAGE,
        dtype="float32",
        kv_dtype="float32",
        num_drafts=NUM_DRAFTS,
    )
    return Target(loaded.config, loaded.params, limits, KernelConfig())


@dataclass
class Life:
    """A sequence. Attributes: row, tokens, states of each; table of its blocks; num_known, as the device knows."""

    row: int
    tokens: np.ndarray
    states: np.ndarray
    table: list[int]
    num_known: int = 0


class Driver:
    """Shows steps to a drafter and asks it for drafts, as the executor does."""

    def __init__(self, drafter: DeviceDrafter, width: int) -> None:
        self.drafter, self.width = drafter, width
        self.state = drafter.make_state(1 + NUM_ROWS * BLOCKS, NUM_ROWS)
        self.rng = np.random.default_rng(3)
        self._observe, self._draft = jax.jit(drafter.observe), jax.jit(drafter.draft, static_argnums=(4, 5))

    def step(self, parts: list[tuple[Life, int, int, int]]) -> None:
        """(sequence, start, stop, wrong drafts behind). States of wrong drafts are noise."""
        tokens, states = np.zeros(TOKENS, np.int32), np.zeros((TOKENS, self.width), np.float32)
        starts, contexts, at = [0], [], 0
        for life, start, stop, wrong in parts:
            end = at + stop - start
            tokens[at:end], states[at:end] = life.tokens[start:stop], life.states[start:stop]
            at = end + wrong
            tokens[end:at] = self.rng.integers(0, 40, wrong)
            states[end:at] = self.rng.standard_normal((wrong, self.width))
            starts.append(at)
            contexts.append(stop + wrong)
        padding = SEQS - len(parts)
        batch = RaggedBatch(
            jnp.array(starts + [at] * padding),
            jnp.array(contexts + [0] * padding),
            self._tables([life for life, *_ in parts]),
            jnp.array(len(parts)),
        )
        rows = jnp.array([life.row for life, *_ in parts] + [NUM_ROWS] * padding)
        positions = token_positions(batch, TOKENS)
        none = jnp.zeros((0,), jnp.int32)
        shown = TokenRows(rows, jnp.asarray(tokens), positions, none, none, batch)
        self.state = self._observe(self.drafter.weights, self.state, shown, jnp.asarray(states))

    def draft(self, lives: list[Life], nums: list[int]) -> np.ndarray:
        """int32[S, K]."""
        padding = SEQS - len(lives)

        def array(values: list[int], rest: int = 0) -> jax.Array:
            return jnp.array(values + [rest] * padding, jnp.int32)

        rows = DraftRows(
            rows=array([life.row for life in lives], NUM_ROWS),
            last_token=array([int(life.tokens[life.num_known - 1]) for life in lives]),
            num_known=array([life.num_known for life in lives]),
            num_drafts=array(nums),
            block_tables=self._tables(lives),
            sampling=unpack(jnp.asarray(np.tile(padding_params(), (SEQS, 1)))),
        )
        given = self._draft(self.drafter.weights, self.state, (), rows, NUM_DRAFTS, SamplerVariant.GREEDY)
        assert given.cache == ()
        self.state = given.state
        return np.asarray(given.token_ids)

    @staticmethod
    def _tables(lives: list[Life]) -> jax.Array:
        tables = np.zeros((SEQS, BLOCKS), np.int32)
        for place, life in enumerate(lives):
            tables[place, : len(life.table)] = life.table
        return jnp.asarray(tables)


def live(drafter: DeviceDrafter, width: int, guess: Guess) -> None:
    """Two sequences in chunks, beside each other, with right and wrong drafts and steps without drafts; every guess is
    what numpy makes of the whole sequence.
    """
    rng, driver = np.random.default_rng(4), Driver(drafter, width)

    def life(row: int, first_block: int) -> Life:
        states = rng.standard_normal((20, width)).astype(np.float32)
        return Life(row, rng.integers(0, 40, 20), states, list(range(first_block, first_block + BLOCKS)))

    def check(*lives: Life) -> None:
        drafts = driver.draft(list(lives), [NUM_DRAFTS] * len(lives))
        for place, one in enumerate(lives):
            known = one.num_known
            assert drafts[place].tolist() == guess(one.tokens[:known], one.states[: known - 1])

    long, short = life(2, 1), life(0, 1 + BLOCKS)
    driver.step([(long, 0, 5, 0)])
    driver.step([(short, 0, 1, 0), (long, 5, 9, 0)])
    long.num_known, short.num_known = 10, 2
    check(short, long)
    driver.step([(short, 1, 2, 3), (long, 9, 12, 1)])  # all of short's drafts are wrong, two of long's right
    long.num_known, short.num_known = 13, 3
    check(long, short)
    driver.step([(long, 12, 13, 0), (short, 2, 3, 0)])  # no drafts are verified
    long.num_known, short.num_known = 14, 4
    driver.draft([long], [1])  # less room than K: nothing beyond is written
    check(short)
    driver.step([(long, 13, 17, 0), (short, 3, 4, 0)])  # all right
    long.num_known, short.num_known = 18, 5
    check(short, long)
    # Its row goes to another sequence, which another's blocks begin: no state is there before its first token.
    other = Life(2, long.tokens, long.states, long.table, 10)
    driver.step([(other, 8, 9, 0)])
    check(other)


def write(directory: Path, raw: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A head's files."""
    return write_checkpoint(directory, raw, tensors)


def test_eagle(tmp_path: Path, loaded: LoadedModel) -> None:
    """The head's own cache and the states before each step."""
    raw = eagle_raw(RAW)
    tensors = eagle_random(raw)
    drafter = make_heads("eagle", write(tmp_path, raw, tensors), NUM_DRAFTS, target(loaded))
    table, head = np.asarray(loaded.params["embed.weight"]), np.asarray(loaded.params["head.weight"])

    def guess(tokens: np.ndarray, states: np.ndarray) -> list[int]:
        ids, features = list(tokens[1:]), states
        for _ in range(NUM_DRAFTS):
            out = eagle_reference(raw, tensors, table[ids], features)[-1]
            ids.append(int((out @ head.T).argmax()))
            features = np.concatenate([features, out[None]])
        return ids[-NUM_DRAFTS:]

    assert drafter.block_bytes == 2 * PAGE * 6 * 4 and drafter.observes
    live(drafter, 12, guess)


def test_eagle3(tmp_path: Path, loaded: LoadedModel) -> None:
    """Streams of three layers, fewer tokens than the model's."""
    raw = eagle_raw(RAW, draft_vocab_size=15)
    tensors = eagle3_random(raw, 12)
    drafter = make_heads("eagle3", write(tmp_path, raw, tensors), NUM_DRAFTS, target(loaded))
    table = np.asarray(loaded.params["embed.weight"])
    known = np.flatnonzero(tensors["t2d"])

    def guess(tokens: np.ndarray, states: np.ndarray) -> list[int]:
        ids, features = list(tokens[1:]), states @ tensors["fc.weight"].T
        for _ in range(NUM_DRAFTS):
            out = eagle3_reference(raw, tensors, table[ids], features)[-1]
            logits = norm(out, tensors["norm.weight"], raw["rms_norm_eps"]) @ tensors["lm_head.weight"].T
            ids.append(int(known[logits.argmax()]))
            features = np.concatenate([features, out[None]])
        return ids[-NUM_DRAFTS:]

    live(drafter, 36, guess)


def test_medusa(tmp_path: Path, loaded: LoadedModel) -> None:
    """All heads on the state that the last token was sampled from."""
    tensors = medusa_random(12, 40, heads=NUM_DRAFTS, layers=1)
    path = write(tmp_path, {"medusa_num_heads": NUM_DRAFTS, "medusa_num_layers": 1}, tensors)

    def guess(tokens: np.ndarray, states: np.ndarray) -> list[int]:
        drafts = []
        for head in range(NUM_DRAFTS):
            x = states[-1]
            x = x + silu(x @ tensors[f"{head}.0.linear.weight"].T + tensors[f"{head}.0.linear.bias"])
            drafts.append(int((x @ tensors[f"{head}.1.weight"].T).argmax()))
        return drafts

    live(make_heads("medusa", path, NUM_DRAFTS, target(loaded)), 12, guess)
    with pytest.raises(ConfigError, match="num_speculative_tokens is 4, and .* has 3 Medusa heads"):
        make_heads("medusa", path, NUM_DRAFTS + 1, target(loaded))
