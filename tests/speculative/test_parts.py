"""N-grams, rates, times and the decision, each by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.requests.request import Request
from engine.requests.sequence import Sequence
from engine.runtime.buckets import BucketTable
from engine.runtime.speculation import make_speculator
from engine.sampling_params import SamplingParams
from engine.scheduling.plan import FROM_DRAFT
from engine.speculative.acceptance import AcceptanceRate
from engine.speculative.device import DeviceSpeculator
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
    speculator = Speculator(Fixed((5, 6, 7)), StepTimes({1: 1.0, 8: 1.0}, {3: {1: 1.5, 8: 3.9}}), 8)
    few, many = [sequence_of([1])], [sequence_of([1]) for _ in range(8)]
    for sequence in (*few, *many):
        speculator.on_tokens(sequence, [1], 0)
    for _ in range(30):
        for sequence in (*few, *many):
            speculator.on_tokens(sequence, [5 if right else 9], 0)
    assert speculator.pays(few) == (3 if expected else 0)
    assert speculator.pays(many) == 0, "nearly four times as long for four times the tokens at best"
    speculator.give(few, 3)
    assert few[0].draft_token_ids == (5, 6, 7)
    assert speculator.pays([sequence_of([1]) for _ in range(9)]) == 0, "no shape for so many"
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
    speculator = Speculator(NgramProposer(2, 4, 3), StepTimes({1: 1.0, 8: 1.0}, {3: {1: 1.0, 8: 5.0}}))
    one = sequence_of([1, 2, 3, 4, 5], [1])
    many = [one, *(sequence_of([1]) for _ in range(7))]
    speculator.on_tokens(one, [1], 0)
    assert not speculator.pays(many)
    one.output_token_ids.append(2)
    speculator.on_tokens(one, [2], 0)
    speculator.give([one], 3)
    assert one.draft_token_ids == ()
    assert not speculator.pays([one]), "it has yet to guess"
    one.output_token_ids.append(3)
    speculator.on_tokens(one, [3], 0)
    assert speculator.pays([one])
    speculator.give([one], 3)
    assert one.draft_token_ids == (4, 5, 1)


def test_times_follow_what_is_seen() -> None:
    times = StepTimes({4: 1.0}, {5: {4: 2.0}})
    for _ in range(60):
        times.observe(4, 3.0, 5)
    assert times.seconds(3, 5) == pytest.approx(3.0, rel=0.01)
    times.observe(4, 1000.0)
    assert times.seconds(4) < 1.3, "a pause of the machine is not believed"
    times.observe(64, 1.0)  # a bucket that nothing is thought of in
    assert times.seconds(5) is None


def test_slow_steps_with_drafts_are_forgotten() -> None:
    """Twice as long at the start, six times for a while, and then nobody tried."""
    times = StepTimes({4: 1.0}, {3: {4: 2.0}})
    for _ in range(60):
        times.observe(4, 6.0, 3)
    for _ in range(300):
        times.observe(4, 1.5)
    assert times.seconds(4, 3) > 5.5, "a moment ago"  # type: ignore[operator]
    for _ in range(10_000):
        times.observe(4, 1.5)
    assert times.seconds(4, 3) == pytest.approx(3.0, rel=0.05), "twice as long as a step now takes without"


def test_the_number_of_drafts_that_gives_most() -> None:
    """Rows are free for one sequence, for four of them up to 16 rows, and never for 64."""
    times = StepTimes({1: 1.0, 4: 1.0, 64: 1.0}, {3: {1: 1.0, 4: 1.1, 64: 3.9}, 7: {1: 1.1, 4: 2.0}})

    def best(count: int, rate: float) -> int:
        found = times.best(count, lambda most: count * sum(rate ** (1 + place) for place in range(most)))
        return 0 if found is None or found.gain <= 1.02 else found.num_drafts

    assert best(1, 0.95) == 7 and best(1, 0.2) == 3 and best(1, 0.01) == 0
    assert best(4, 0.95) == 3 and best(4, 0.05) == 0
    assert best(64, 0.95) == 0 and not times.can_pay(64, 1.03)
    assert times.best(65, float) is None


def test_host_and_device_drafts_take_the_size_that_pays() -> None:
    times = {1: 1.0, 8: 1.0}, {3: {1: 1.0, 8: 1.5}, 7: {1: 1.0, 8: 9.0}}
    host = Speculator(Fixed((1, 2, 3, 4, 5, 6, 7)), StepTimes(*times), 8)
    device = DeviceSpeculator(7, StepTimes(*times), 8, lambda sequence: False, lambda sequence: None)
    sequences = [sequence_of([1]) for _ in range(8)]
    for sequence in sequences:
        host.on_tokens(sequence, [1], 0)
        device.on_tokens(sequence, [1], 0)
    for speculator in (host, device):
        assert speculator.pays(sequences[:1]) == 7
        assert speculator.pays(sequences) == 3
    host.give(sequences, 3)
    assert {sequence.draft_token_ids for sequence in sequences} == {(1, 2, 3)}
    device.give(sequences, 3)
    assert {sequence.draft_token_ids for sequence in sequences} == {(FROM_DRAFT,) * 3}


def test_device_drafts_that_fail_are_tried_again_now_and_then() -> None:
    device = DeviceSpeculator(3, StepTimes({1: 1.0}, {3: {1: 2.0}}), 1, lambda sequence: False, lambda sequence: None)
    one = sequence_of([1])
    given = 0
    for _ in range(2000):
        num_drafts = device.pays([one])
        given += num_drafts > 0
        device.on_tokens(one, [1], num_drafts)
    assert 4 <= given <= 12, "a few at first, then one of some hundred"
