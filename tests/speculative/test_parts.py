"""N-grams, rates, times and the decision, each by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.requests.request import Request
from engine.requests.sequence import Sequence
from engine.runtime.buckets import BucketTable
from engine.runtime.speculation import make_speculator
from engine.sampling_params import SamplingParams
from engine.speculative.acceptance import AcceptanceRate
from engine.speculative.ngram import NgramProposer
from engine.speculative.settings import SpeculativeSettings
from engine.speculative.speculator import Speculator
from engine.speculative.times import StepTimes


def sequence_of(prompt: list[int], outputs: list[int] | None = None) -> Sequence:
    request = Request("r", None, tuple(prompt), SamplingParams(), (), (), 0, 0, None, 0.0)
    sequence = Sequence(request)
    sequence.output_token_ids = outputs or []
    return sequence


def proposed(prompt: list[int], outputs: list[int], *, shortest: int = 2, longest: int = 4, count: int = 3) -> tuple:
    proposer, sequence = NgramProposer(shortest, longest, count), sequence_of(prompt, outputs)
    proposer.extend(sequence)
    return proposer.propose(sequence)


def test_what_followed_the_last_tokens() -> None:
    assert proposed([1, 2, 3, 4, 5, 6], [2, 3]) == (4, 5, 6)
    assert proposed([1, 2, 3, 4, 5, 6], [9, 3]) == ()
    assert proposed([1], []) == ()


def test_the_longest_match_goes_before_the_latest() -> None:
    assert proposed([7, 1, 2, 50, 51, 52, 8, 1, 2, 60, 61, 62], [7, 1, 2]) == (50, 51, 52)
    assert proposed([7, 1, 2, 50, 51, 52, 8, 1, 2, 60, 61, 62], [9, 1, 2]) == (60, 61, 62)


def test_text_in_a_loop_goes_on() -> None:
    assert proposed([], [1, 2, 1, 2, 1, 2], count=5) == (1, 2, 1, 2, 1)
    assert proposed([], [4, 4, 4], count=4) == (4, 4, 4, 4)


def test_tokens_come_in_pieces() -> None:
    proposer, sequence = NgramProposer(2, 4, 2), sequence_of([1, 2, 3, 4])
    for token in (9, 1, 2):
        sequence.output_token_ids.append(token)
        proposer.extend(sequence)
    assert proposer.propose(sequence) == (3, 4)
    proposer.forget(sequence)
    assert proposer._histories == {}


def test_rates_forget() -> None:
    rate = AcceptanceRate()
    assert rate.value == 0.5
    for _ in range(40):
        rate.observe(3, 3)
    assert rate.value > 0.95 and rate.expected(3) == pytest.approx(3, abs=0.2)
    for _ in range(40):
        rate.observe(0, 3)
    assert rate.value < 0.05 and rate.expected(3) < 0.06


class Fixed:
    def __init__(self, drafts: tuple[int, ...]) -> None:
        self.drafts = drafts

    def extend(self, sequence: Sequence) -> None: ...

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        return self.drafts

    def forget(self, sequence: Sequence) -> None: ...


@pytest.mark.parametrize(("right", "expected"), [(True, True), (False, False)])
def test_drafts_where_they_pay(right: bool, expected: bool) -> None:
    """The first guess after each token is a trial, whether or not drafts are given."""
    speculator = Speculator(Fixed((5, 6, 7)), StepTimes({1: 1.0, 8: 1.0}, {1: 1.5, 8: 4.0}), 8)
    few, many = [sequence_of([1])], [sequence_of([1]) for _ in range(8)]
    for sequence in (*few, *many):
        speculator.on_tokens(sequence, [1], 0)
    for _ in range(30):
        for sequence in (*few, *many):
            speculator.on_tokens(sequence, [5 if right else 9], 0)
    assert speculator.pays(few) is expected
    assert speculator.pays(many) is False, "four times as long for four times the tokens at best"
    speculator.give(few)
    assert few[0].draft_token_ids == (5, 6, 7)
    assert speculator.pays([sequence_of([1]) for _ in range(9)]) is False, "no shape for so many"
    for sequence in (*few, *many):
        speculator.forget(sequence)
    assert speculator._guesses == {}


def test_no_drafts_for_more_sequences_than_a_step_may_verify() -> None:
    """Also where nobody asks whether they pay: a step of 24 tokens holds a token and three drafts of four sequences."""
    settings = SpeculativeSettings(method="ngram", num_speculative_tokens=3, adaptive=False)
    program = SimpleNamespace(buckets=BucketTable(24, 8, 3), drafter=None)
    speculator = make_speculator(settings, SimpleNamespace(program=program))  # type: ignore[arg-type]
    assert speculator is not None
    sequences = [sequence_of([1, 2, 3], [1, 2]) for _ in range(5)]
    for sequence in sequences:
        speculator.on_tokens(sequence, sequence.output_token_ids, 0)
    assert speculator.pays(sequences[:4]) and not speculator.pays(sequences)


def test_nobody_guesses_where_it_cannot_pay() -> None:
    """Guesses stop with too many sequences, and go on from all tokens with fewer."""
    speculator = Speculator(NgramProposer(2, 4, 3), StepTimes({1: 1.0, 8: 1.0}, {1: 1.0, 8: 5.0}, most_drafts=3))
    one = sequence_of([1, 2, 3, 4, 5], [1])
    many = [one, *(sequence_of([1]) for _ in range(7))]
    speculator.on_tokens(one, [1], 0)
    assert not speculator.pays(many)
    one.output_token_ids.append(2)
    speculator.on_tokens(one, [2], 0)
    speculator.give([one])
    assert one.draft_token_ids == ()
    assert not speculator.pays([one]), "it has yet to guess"
    one.output_token_ids.append(3)
    speculator.on_tokens(one, [3], 0)
    assert speculator.pays([one])
    speculator.give([one])
    assert one.draft_token_ids == (4, 5, 1)


def test_times_follow_what_is_seen() -> None:
    times = StepTimes({4: 1.0}, {4: 2.0})
    for _ in range(60):
        times.observe(4, 3.0, drafts=True)
    assert times.seconds(3, drafts=True) == pytest.approx(3.0, rel=0.01)
    times.observe(4, 1000.0, drafts=False)
    assert times.seconds(4, drafts=False) < 1.3, "a pause of the machine is not believed"
    times.observe(64, 1.0, drafts=False)  # a bucket that nothing is thought of in


def test_slow_steps_with_drafts_are_forgotten() -> None:
    """Twice as long at the start, six times for a while, and then nobody tried."""
    times = StepTimes({4: 1.0}, {4: 2.0})
    for _ in range(60):
        times.observe(4, 6.0, drafts=True)
    for _ in range(300):
        times.observe(4, 1.5, drafts=False)
    assert times.seconds(4, drafts=True) > 5.5, "a moment ago"
    for _ in range(10_000):
        times.observe(4, 1.5, drafts=False)
    assert times.seconds(4, drafts=True) == pytest.approx(3.0, rel=0.05), "twice as long as a step now takes without"
