"""Packing and unpacking lose nothing; limits are checked; a request's draws depend on nothing but itself."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from engine.errors import InvalidRequestError
from engine.requests.constraints import check_constraints
from engine.requests.request import Request
from engine.runtime.sampling import (
    Flag,
    SamplerVariant,
    needs_state,
    padding_params,
    unpack,
)
from engine.runtime.sampling.inputs import WIDTH, completion_seed
from engine.sampling_params import SamplingParams
from tests.sampling.helpers import block_of, make_request, random_state, set_rows, situation, step
from tests.sampling.reference import Situation

V = 24


def test_round_trip() -> None:
    params = situation(
        temperature=0.73, top_k=17, top_p=0.91, min_p=0.03, repetition_penalty=1.1, frequency_penalty=-0.5, min_tokens=4
    )
    one = replace(params, params=params.params.replace(presence_penalty=1.5, stop_token_ids=[3]), stop_token_ids=(3,))
    seed = -(2**63) + 12345
    block = block_of([None, make_request(one, seed=seed)], [0, 7], [0, 6], 4, 9)
    assert block.shape == (4, WIDTH) and block.dtype == np.int32
    inputs = unpack(jnp.asarray(block))
    assert list(inputs.row) == [9, 7, 9, 9]
    assert inputs.position[1] == 6 and inputs.min_position[1] == 7
    assert int(inputs.seed[1, 0]) | int(inputs.seed[1, 1]) << 32 == seed & (2**64 - 1)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        assert vars(inputs)[name][1] == np.float32(vars(one.params)[name]), name
    assert inputs.top_k[1] == 17
    assert bool(inputs.has(Flag.PENALTIES)[1]) and bool(inputs.masks_stops[1]) and not bool(inputs.has(Flag.BIAS)[1])
    assert bool(inputs.is_greedy[0]) and not bool(inputs.is_greedy[1])
    assert not bool(inputs.has(Flag.state()).at[1].set(False).any())
    np.testing.assert_array_equal(block[0, 2:], padding_params()[2:])


def test_needs_state() -> None:
    plain = [
        situation(),
        situation(temperature=0.0, logprobs=5),
        situation(top_k=5, min_p=0.1),
        situation(min_tokens=3),
    ]
    assert not any(needs_state(make_request(s)) for s in plain)
    stateful = [
        situation(presence_penalty=0.1),
        situation(logit_bias={1: 0.0}),
        situation(allowed_token_ids=[1]),
        replace(situation(bad_words=["x"]), bad_word_ids=((1,),)),
        replace(situation(bad_words=["x"]), bad_word_ids=((1, 2),)),
        situation(min_tokens=3, stop_token_ids=[1]),
    ]
    assert all(needs_state(make_request(s)) for s in stateful)
    assert needs_state(make_request(replace(situation(min_tokens=3), stop_token_ids=(2,)), ignore_eos=False))


def test_bad_words_too_long_or_too_many() -> None:
    params = SamplingParams(bad_words=["x"])
    check_constraints(params, [tuple(range(16))] * 256, ())
    for words, part in (([tuple(range(17))], "17"), ([()], "0"), ([(1,)] * 257, "257")):
        with pytest.raises(InvalidRequestError, match=part) as caught:
            check_constraints(params, words, ())
        assert caught.value.parameter == "bad_words"


def test_constraints_that_leave_nothing() -> None:
    params = SamplingParams(allowed_token_ids=[4, 5], bad_words=["x"], min_tokens=2)
    check_constraints(params, [(4,), (5, 5)], (4,))
    with pytest.raises(InvalidRequestError, match="bad_words forbids every token"):
        check_constraints(params, [(4,), (5,)], ())
    with pytest.raises(InvalidRequestError, match="min_tokens=2") as caught:
        check_constraints(params, [(4,)], (5,))
    assert caught.value.parameter == "min_tokens"


def test_seeds_of_completions_differ() -> None:
    seeds = {completion_seed(seed, index) for seed in (0, 1, -1, 2**63 - 1) for index in range(100)}
    assert len(seeds) == 400
    assert completion_seed(-1, 0) == 2**64 - 1


def tokens_of(one: Situation, seed: int, num_seqs: int, slot: int, row: int, mates: Situation | None) -> list[int]:
    """40 draws of a request at positions 3, 4, ... among other requests; the logits depend on the position alone."""
    request = make_request(one, seed=seed)
    state = random_state(V, num_rows=20)
    state = set_rows(state, [one] * (row + 1)) if needs_state(request) else state
    requests: list[Request | None] = [None] * num_seqs
    if mates is not None:
        requests = [make_request(mates, seed=i) for i in range(num_seqs)]
    requests[slot] = request
    rows = [i % 20 if i % 20 != row else 19 for i in range(num_seqs)]
    rows[slot] = row
    tokens = []
    for position in range(3, 43):
        logits = np.random.default_rng(100 + position).normal(size=(num_seqs, V)).astype(np.float32)
        logits[slot] = np.random.default_rng(position).normal(size=V)
        block = block_of(requests, rows, [position] * num_seqs, num_seqs, state.padding_row)
        sampled, state = step(jnp.asarray(logits), block, state, SamplerVariant.FULL)
        tokens.append(int(sampled.token[slot]))
    return tokens


@pytest.mark.parametrize("knobs", [{}, {"top_k": 9, "top_p": 0.9}, {"min_p": 0.1, "frequency_penalty": 0.5}])
def test_draws_do_not_depend_on_the_batch(knobs: dict[str, float]) -> None:
    one = situation(temperature=0.9, **knobs)
    alone = tokens_of(one, 42, num_seqs=1, slot=0, row=0, mates=None)
    assert len(set(alone)) > 3
    for num_seqs, slot, row, mates in (
        (16, 9, 3, situation(top_p=0.3, min_p=0.2)),
        (16, 0, 11, situation(temperature=0.0)),
        (16, 2, 4, None),
        (40, 33, 7, situation(top_k=2, logprobs=3)),
    ):
        assert tokens_of(one, 42, num_seqs, slot, row, mates) == alone
    assert tokens_of(one, 43, num_seqs=1, slot=0, row=0, mates=None) != alone
    assert tokens_of(one, 42 + 2**32, num_seqs=1, slot=0, row=0, mates=None) != alone
