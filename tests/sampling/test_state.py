"""The device remembers what a request needs, over many steps, rows and preemptions, whatever was in the rows before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.requests.request import Request
from engine.runtime.sampling import (
    SamplerState,
    SamplerVariant,
    choose_variant,
    make_state,
    reset_row,
    state_size_bytes,
    warm_up_rows,
)
from engine.runtime.sampling.state import IN_PROMPT, _add_history, _write_row
from tests.sampling.helpers import NUM_EOS, NUM_ROWS, block_of, make_request, random_state, set_rows, situation, step
from tests.sampling.reference import Situation, distribution

V = 16


def decode(
    logits: np.ndarray, one: Situation, num_steps: int, row: int = 3, preempt_at: Sequence[int] = ()
) -> tuple[list[int], SamplerState]:
    """Outputs of a request that runs alone; now and then it is preempted and comes back in another row.

    Args:
        logits: float32[num_steps, V], of each step.
        one: its outputs so far are where it starts.
        num_steps: tokens to sample.
        row: its first row.
        preempt_at: steps before which it moves to the next row.
    """
    request = make_request(one, seed=11, ignore_eos=False)
    state = random_state(V)
    outputs = list(one.outputs)
    state = reset_row(state, row, request, outputs)
    for i in range(num_steps):
        if i in preempt_at:
            row = (row + 1) % NUM_ROWS
            state = reset_row(state, row, request, outputs)
        block = block_of([request, None], [row, 0], [len(one.prompt) + len(outputs), 0], 2, state.padding_row)
        both = np.stack([logits[i], np.zeros(V, np.float32)])
        sampled, state = step(jnp.asarray(both), block, state, SamplerVariant.FULL)
        outputs.append(int(sampled.token[0]))
    return outputs, state


def expected_greedy(logits: np.ndarray, one: Situation, num_steps: int) -> list[int]:
    """The same by the specification."""
    outputs = list(one.outputs)
    for i in range(num_steps):
        probabilities, _ = distribution(logits[i], replace(one, outputs=tuple(outputs)))
        outputs.append(int(probabilities.argmax()))
    return outputs


GREEDY_RUNS = {
    "frequency": situation(temperature=0.0, frequency_penalty=0.6),
    "presence": situation(temperature=0.0, presence_penalty=1.1),
    "repetition": situation(temperature=0.0, repetition_penalty=1.4),
    "all_penalties": situation(
        temperature=0.0, repetition_penalty=0.8, frequency_penalty=0.9, presence_penalty=-0.4, logit_bias={2: 1.0}
    ),
    "bad_words": replace(
        situation(temperature=0.0, bad_words=["x"]),
        bad_word_ids=tuple((a, b) for a in range(0, V, 2) for b in range(0, V, 3)) + ((1, 3, 5), (9,)),
    ),
    "min_tokens": replace(situation(temperature=0.0, min_tokens=12), stop_token_ids=tuple(range(0, V, 2))),
}


@pytest.mark.parametrize("preempt_at", [(), (5, 6, 17)])
@pytest.mark.parametrize("name", GREEDY_RUNS)
def test_a_long_output_follows_the_specification(name: str, preempt_at: tuple[int, ...]) -> None:
    """Flat logits that hardly change, so that what was sampled decides; preemption makes no difference."""
    one = replace(GREEDY_RUNS[name], stop_token_ids=GREEDY_RUNS[name].stop_token_ids[:NUM_EOS])
    if name == "min_tokens":
        one = replace(one, params=one.params.replace(stop_token_ids=[4, 6]), stop_token_ids=(4, 6, 0, 2))
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=V) + 0.2 * rng.normal(size=(40, V))).astype(np.float32)
    logits[:, 0] += 1.0  # a favourite, which is also a stop token in the run with min_tokens
    outputs, _ = decode(logits, one, 40, preempt_at=preempt_at)
    assert outputs == expected_greedy(logits, one, 40)
    assert len(set(outputs)) > 1


def test_min_tokens_ends_at_the_right_token() -> None:
    """The stop token is the favourite, and comes first at output number min_tokens + 1."""
    logits = np.zeros((10, V), np.float32)
    logits[:, 7] = 5.0
    one = replace(situation(temperature=0.0, min_tokens=4, stop_token_ids=[7]), stop_token_ids=(7,))
    outputs, _ = decode(logits, one, 6)
    assert outputs.index(7) == 4


def test_bad_word_across_steps_and_preemption() -> None:
    """5 is the favourite; it is banned only right after 3, 4."""
    logits = np.zeros((6, V), np.float32)
    for i, token in enumerate((3, 4, 5, 3, 4, 5)):
        logits[i, token] = 5.0
        logits[i, 9] = 1.0
    one = replace(situation(temperature=0.0, bad_words=["x"]), bad_word_ids=((3, 4, 5),))
    for preempt_at in ((), (1,), (2,), (5,)):
        outputs, _ = decode(logits, one, 6, preempt_at=preempt_at)
        assert outputs == [3, 4, 9, 3, 4, 9]


def test_bad_word_of_sixteen_tokens() -> None:
    word = tuple(range(16))
    logits = np.zeros((16, V), np.float32)
    for i, token in enumerate(word):
        logits[i, token] = 5.0
    one = replace(situation(temperature=0.0, bad_words=["x"]), bad_word_ids=(word,))
    outputs, _ = decode(logits, one, 16)
    assert outputs[:15] == list(range(15)) and outputs[15] != 15
    shifted, _ = decode(np.roll(logits, 1, axis=1), one, 16)
    assert shifted == [*range(1, 16), 0]


def test_a_bad_word_does_not_begin_in_the_prompt() -> None:
    logits = np.zeros((1, V), np.float32)
    logits[0, 5] = 1.0
    one = replace(situation(temperature=0.0, bad_words=["x"]), bad_word_ids=((4, 5),), prompt=(1, 4))
    assert decode(logits, one, 1)[0] == [5]


def test_counts_on_the_device() -> None:
    one = situation(temperature=1.5, frequency_penalty=0.1, repetition_penalty=1.1)
    outputs, state = decode(np.zeros((30, V), np.float32), one, 30, row=3)
    info = np.asarray(state.token_info[3])
    np.testing.assert_array_equal(info & (IN_PROMPT - 1), np.bincount(outputs, minlength=V))
    np.testing.assert_array_equal(np.flatnonzero(info & IN_PROMPT), [1, 2, 3])


def test_only_the_rows_that_ask_change() -> None:
    """A step leaves all other rows as they were, the row of a sequence in the middle of its prompt among them."""
    situations = [
        situation(frequency_penalty=0.5),
        situation(temperature=0.5),
        replace(situation(bad_words=["x"]), bad_word_ids=((1, 2),)),
        situation(logit_bias={3: 1.0}, logprobs=2),
        situation(presence_penalty=0.5),
    ]
    before = set_rows(random_state(V), situations)
    requests: list[Request | None] = [make_request(s) for s in situations]
    requests[4] = None
    block = block_of(requests, range(5), [3] * 5, 8, before.padding_row)
    sampled, after = step(jnp.zeros((8, V)), block, before, SamplerVariant.FULL)
    changed = np.flatnonzero((np.asarray(before.token_info) != np.asarray(after.token_info)).any(axis=1))
    assert set(changed) <= {0, before.padding_row} and 0 in changed
    changed = np.flatnonzero((np.asarray(before.recent) != np.asarray(after.recent)).any(axis=1))
    assert set(changed) <= {2, before.padding_row} and 2 in changed
    assert after.recent[2, -1] == sampled.token[2]
    for name in ("bias", "stop_ids", "bad_words"):
        np.testing.assert_array_equal(np.asarray(vars(before)[name]), np.asarray(vars(after)[name]))


def test_garbage_in_rows_does_not_leak() -> None:
    """Rows of requests without state hold anything; so does the padding row; tokens stay the same."""
    situations = [
        situation(temperature=0.0),
        situation(top_p=0.8),
        situation(min_p=0.1, logprobs=3),
        situation(top_k=3),
        situation(allowed_token_ids=[5]),  # so that the batch does read the state
    ]
    block = block_of([make_request(s) for s in situations], range(5), [3] * 5, 8, NUM_ROWS)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, V)), jnp.float32)
    clean = step(logits, block, set_rows(make_state(NUM_ROWS, V, NUM_EOS), situations), SamplerVariant.FULL)[0]
    assert clean.token[4] == 5
    for seed in range(5):
        dirty = step(logits, block, set_rows(random_state(V, seed), situations), SamplerVariant.FULL)[0]
        np.testing.assert_array_equal(clean.token[:5], dirty.token[:5])
        jax.tree.map(np.testing.assert_array_equal, clean.logprobs, dirty.logprobs)
    random = step(logits, block, make_state(NUM_ROWS, V, NUM_EOS), SamplerVariant.RANDOM)[0]
    np.testing.assert_array_equal(clean.token[:4], random.token[:4])


def test_reset_writes_the_whole_row() -> None:
    """The same row whatever was there, for a history of several chunks; the other rows stay."""
    vocab_size = 3000
    rng = np.random.default_rng(0)
    prompt = tuple(int(t) for t in rng.integers(0, 1500, 2500))
    outputs = [int(t) for t in rng.integers(1000, vocab_size, 1700)]
    one = replace(
        situation(
            repetition_penalty=1.2,
            logit_bias={5: 2.5, 2999: -1.0},
            allowed_token_ids=list(range(1024)),
            bad_words=["x"],
            min_tokens=3,
            stop_token_ids=[8, 9],
        ),
        prompt=prompt,
        bad_word_ids=((7,), (1, 2, 3)),
        stop_token_ids=(8, 9, 1),
    )
    request = make_request(one, ignore_eos=False)
    for seed in (0, 1):
        before = random_state(vocab_size, seed)
        kept = jax.tree.map(lambda a: np.delete(np.asarray(a), 4, axis=0), before)
        after = reset_row(before, 4, request, outputs)
        jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(lambda a: np.delete(np.asarray(a), 4, 0), after))
        info = np.asarray(after.token_info[4])
        np.testing.assert_array_equal(info & (IN_PROMPT - 1), np.bincount(outputs, minlength=vocab_size))
        np.testing.assert_array_equal(np.flatnonzero(info & IN_PROMPT), np.unique(prompt))
        bias = np.full(vocab_size, -np.inf, np.float32)
        bias[:1024] = 0
        bias[5], bias[7] = 2.5, -np.inf
        np.testing.assert_array_equal(np.asarray(after.bias[4]), bias)
        assert list(after.stop_ids[4, :4]) == [8, 9, 1, -1]
        assert list(after.bad_words[4, 0, -4:]) == [-1, 1, 2, 3] and (np.asarray(after.bad_words[4, 1:]) == -1).all()
        assert list(after.recent[4]) == outputs[-15:]


def test_reset_compiles_nothing_after_warm_up() -> None:
    state = warm_up_rows(make_state(NUM_ROWS, V, NUM_EOS))
    sizes = _write_row._cache_size(), _add_history._cache_size()
    for row, one in enumerate(GREEDY_RUNS.values()):
        state = reset_row(state, row, make_request(one), [1] * (row * 700))
    assert (_write_row._cache_size(), _add_history._cache_size()) == sizes


def test_reset_donates_the_state() -> None:
    state = make_state(NUM_ROWS, V, NUM_EOS)
    reset_row(state, 0, make_request(GREEDY_RUNS["frequency"]))
    assert state.token_info.is_deleted() and state.bias.is_deleted()


def test_state_size() -> None:
    state = make_state(5, 100, 3)
    assert state_size_bytes(5, 100, 3) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_contradictory_bans_give_way() -> None:
    """min_tokens and bad words that leave nothing of allowed_token_ids: the allowed tokens stay."""
    one = replace(
        situation(temperature=0.0, allowed_token_ids=[4, 6], min_tokens=5, stop_token_ids=[4], bad_words=["x"]),
        bad_word_ids=((6, 6),),
        stop_token_ids=(4,),
    )
    logits = np.zeros((5, V), np.float32)
    logits[:, 9] = 3.0
    outputs, _ = decode(logits, one, 5)
    assert outputs == [6, 4, 6, 4, 6]


def test_extreme_penalties_stay_finite() -> None:
    logits = np.linspace(-5, 5, V).astype(np.float32)
    for penalty in (1e-300, 1e-38, 1e38, 1e300):
        one = situation(repetition_penalty=penalty, temperature=0.01, frequency_penalty=2.0)
        outputs, _ = decode(np.tile(logits, (20, 1)), one, 20)
        assert all(0 <= token < V for token in outputs)


def test_variant_of_a_batch() -> None:
    def block(*situations: Situation) -> np.ndarray:
        count = len(situations)
        return block_of([make_request(s) for s in situations], range(count), [3] * count, 4, NUM_ROWS)

    greedy, plain = situation(temperature=0.0), situation()
    assert choose_variant(block()) is SamplerVariant.GREEDY
    assert choose_variant(block(greedy, greedy)) is SamplerVariant.GREEDY
    assert choose_variant(block(greedy, plain)) is SamplerVariant.RANDOM
    for knobs in ({"logprobs": 0}, {"presence_penalty": 1.0}, {"logit_bias": {1: 1.0}}):
        assert choose_variant(block(greedy, situation(temperature=0.0, **knobs))) is SamplerVariant.FULL
