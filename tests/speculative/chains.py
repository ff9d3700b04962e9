"""Thousands of sequences at once, by plain sampling or by verified drafts, over a language of five tokens.

Each sequence has a seed and otherwise the same request, so its tokens are draws from one exact distribution over all
sentences of `LENGTH` tokens. The logits after a token are a row of a table; a grammar may forbid some of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from engine.runtime.sampling import (
    SampledTokens,
    SamplerState,
    SamplerVariant,
    choose_variant,
    make_state,
    needs_state,
    pack_params,
    reset_row,
    sample,
    unpack,
)
from engine.runtime.sampling.inputs import Column
from engine.runtime.sampling.sampler import draw
from engine.runtime.sampling.verify import verify
from engine.runtime.step import mask_logits
from tests.sampling.helpers import NUM_EOS, make_request
from tests.sampling.reference import Situation, distribution

V = 5
LENGTH = 3  # tokens of a sentence
NUM_DRAFTS = 2
NO_DRAFT = -1
NUM_CHAINS = 4096
TARGET = np.random.default_rng(5).normal(size=(V, V)).astype(np.float32) * 1.5
DRAFTER = TARGET + np.random.default_rng(6).normal(size=(V, V)).astype(np.float32)
GRAMMAR = np.array([[(token - last) % V != 0 and (token + last) % V != 1 for token in range(V)] for last in range(V)])

Verify = Callable[..., tuple[SampledTokens, SamplerState]]


@dataclass(frozen=True)
class Case:
    """A request, and whether it follows the grammar."""

    situation: Situation
    grammar: bool = False

    def logits(self, last: np.ndarray) -> np.ndarray:
        """float32[..., V] after the tokens int[...], masked by the grammar as the engine does it."""
        flat = TARGET[last.reshape(-1)]
        if self.grammar:
            words = (GRAMMAR[last.reshape(-1)] << np.arange(V)).sum(-1, dtype=np.int32)[:, None]
            flat = np.asarray(mask_logits(jnp.asarray(flat), jnp.asarray(words)))
        return flat.reshape(*last.shape, V)

    def exact(self) -> np.ndarray:
        """Probabilities float64[V ** LENGTH] of all sentences, from the definitions alone."""
        prompt, outputs = self.situation.prompt, self.situation.outputs
        joint = np.zeros((V,) * LENGTH)
        for sentence in itertools.product(range(V), repeat=LENGTH):
            chance = 1.0
            for place, token in enumerate(sentence):
                before = (*outputs, *sentence[:place])
                last = np.array(before[-1] if before else prompt[-1])
                probabilities, margin = distribution(self.logits(last), replace(self.situation, outputs=before))
                assert margin > 1e-4, "the case is too close to call for float32"
                chance *= probabilities[token]
                if chance == 0:
                    break
            joint[sentence] = chance
        return joint.reshape(-1)


@dataclass(frozen=True)
class Here:
    """Where each chain stands when drafts are made.

    Attributes:
        last: int[S], its last token.
        block: int32[S, W], packed parameters, with the position of the next token.
        known: int32[S, N], prompt and outputs, and -1 behind them.
    """

    last: np.ndarray
    block: np.ndarray
    known: np.ndarray

    def ahead(self, places: int) -> np.ndarray:
        """The block for the token so many places further on."""
        block = self.block.copy()
        block[:, Column.POSITION] += places
        return block


Drafter = Callable[[Here], np.ndarray]  # int32[S, NUM_DRAFTS], NO_DRAFT behind the last of a row


def certain(here: Here) -> np.ndarray:
    """What is most probable without noise: n-grams, suffixes, greedy drafts."""
    return _step_by_step(here, lambda last, _: TARGET[last].argmax(-1))


def coupled(here: Here) -> np.ndarray:
    """Draws from another distribution with the same noise: drafts of a model."""
    return _step_by_step(here, lambda last, block: np.asarray(_draw(DRAFTER[last], block)))


def independent(here: Here) -> np.ndarray:
    """Draws from another distribution with noise of their own."""
    other = here.block.copy()
    other[:, Column.SEED_LOW] ^= 0x5A5A5A5
    return _step_by_step(replace(here, block=other), lambda last, block: np.asarray(_draw(DRAFTER[last], block)))


def adversarial(here: Here) -> np.ndarray:
    """The best token after some, the worst after others."""
    return _step_by_step(
        here, lambda last, _: np.where(TARGET[last].argmax(-1) % 2, TARGET[last].argmin(-1), TARGET[last].argmax(-1))
    )


def _step_by_step(here: Here, guess: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    last, drafts = here.last, []
    for place in range(NUM_DRAFTS):
        last = guess(last, here.ahead(place))
        drafts.append(last)
    return np.stack(drafts, axis=1).astype(np.int32)


@jax.jit
def _draw(logits: jax.Array, block: jax.Array) -> jax.Array:
    return draw(logits, unpack(block))


@partial(jax.jit, static_argnames="variant")
def _plain(
    logits: jax.Array, block: jax.Array, state: SamplerState, variant: SamplerVariant
) -> tuple[SampledTokens, SamplerState]:
    return sample(logits, unpack(block), state, variant, 1)


def jitted(verifier: Verify) -> Verify:
    """As the engine jits it, but without donation. Each call traces anew: a planted fault is not cached away."""

    def run(
        logits: jax.Array,
        block: jax.Array,
        num: jax.Array,
        ids: jax.Array,
        state: SamplerState,
        variant: SamplerVariant,
    ) -> tuple[SampledTokens, SamplerState]:
        return verifier(logits, unpack(block), num, ids, state, variant, 1)

    return jax.jit(run, static_argnames="variant")


VERIFY = jitted(verify)


def start(case: Case, seeds: np.ndarray) -> tuple[Here, SamplerState, SamplerVariant]:
    """The chains before their first token.

    Args:
        case: of all of them.
        seeds: uint32[S, 2].
    """
    situation, num = case.situation, len(seeds)
    request = make_request(situation, ignore_eos=False)
    state = make_state(1, V, NUM_EOS)
    if needs_state(request):
        state = reset_row(state, 0, request, situation.outputs)
    # One row for each chain, and the padding row. Of the bad words only the few that are used: the table is large.
    index = np.array([0] * num + [1])
    state = jax.tree.map(lambda x: x[index], replace(state, bad_words=state.bad_words[:, :8]))
    block = np.tile(pack_params(request), (num, 1))
    block[:, Column.SEED_LOW : Column.SEED_HIGH + 1] = seeds.view(np.int32)
    block[:, Column.ROW] = np.arange(num)
    block[:, Column.POSITION] = len(situation.prompt) + len(situation.outputs)
    last = situation.outputs[-1] if situation.outputs else situation.prompt[-1]
    before = (*situation.prompt, *situation.outputs)
    known = np.tile(np.array([*before, *[-1] * (LENGTH + NUM_DRAFTS)], np.int32), (num, 1))
    return Here(np.full(num, last), block, known), state, choose_variant(block)


def plain(case: Case, seeds: np.ndarray) -> np.ndarray:
    """int32[S, LENGTH] by one token after another."""
    here, state, variant = start(case, seeds)
    tokens = []
    for _ in range(LENGTH):
        sampled, state = _plain(case.logits(here.last), here.block, state, variant)
        tokens.append(np.asarray(sampled.token))
        here = Here(tokens[-1], here.ahead(1), here.known)
    return np.stack(tokens, axis=1)


def speculated(case: Case, drafter: Drafter, seeds: np.ndarray, verifier: Verify = VERIFY) -> tuple[np.ndarray, float]:
    """int32[S, LENGTH] by drafts that are verified, and the share of drafts that were right."""
    here, state, variant = start(case, seeds)
    num = len(seeds)
    tokens = np.full((num, LENGTH + NUM_DRAFTS), -1, np.int32)
    done, right, trials, start_at = np.zeros(num, int), 0, 0, here.known.shape[1] - tokens.shape[1]
    while (done < LENGTH).any():
        given = drafter(here)
        drafts = np.maximum(given, 0)
        path = np.concatenate([here.last[:, None], drafts], axis=1)
        # Some chains have fewer drafts than there is room for; those that are done go on for nothing.
        room = np.where(np.arange(num) % 4 == 0, NUM_DRAFTS - 1, NUM_DRAFTS)
        num_drafts = np.minimum(room, (given != NO_DRAFT).sum(1)).astype(np.int32)
        logits = case.logits(path).reshape(-1, V)
        sampled, state = verifier(logits, here.block, num_drafts, drafts, state, variant=variant)
        assert sampled.count is not None
        got, count = np.asarray(sampled.token).reshape(num, -1), np.asarray(sampled.count)
        live = done < LENGTH
        right, trials = right + int((count - 1)[live].sum()), trials + int(num_drafts[live].sum())
        for place in range(NUM_DRAFTS + 1):
            here_too = live & (place < count)
            tokens[here_too, done[here_too] + place] = got[here_too, place]
        done = done + np.where(live, count, 0)
        block = here.block.copy()
        block[:, Column.POSITION] += count
        here.known[:, start_at:] = tokens
        here = Here(got[np.arange(num), count - 1], block, here.known)
    return tokens[:, :LENGTH], right / max(trials, 1)


def sentence_ids(tokens: np.ndarray) -> np.ndarray:
    """int[S]: the number of each sentence, as `Case.exact` counts them."""
    return np.asarray(np.ravel_multi_index(tuple(tokens.T), (V,) * LENGTH))
