"""When a sequence ends: EOS, then stop token ids, then length; `min_tokens` holds the first two back."""

import pytest

from engine.requests.sequence import FinishReason, Sequence
from engine.scheduling.stopping import find_stop
from tests.scheduling.toy import ToyEngine, make_limits, make_sequences

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def make_sequence(outputs: list[int], eos: tuple[int, ...] = (2, 3), **params) -> Sequence:
    settings = {"max_tokens": 4, "stop_token_ids": (7, 2)}
    sequence = make_sequences("r", [1, 1, 1], eos=eos, **{**settings, **params})[0]
    sequence.output_token_ids = outputs
    return sequence


@pytest.mark.parametrize(
    ("outputs", "params", "expected"),
    [
        ([5], {}, None),
        ([2], {}, (STOP, None)),  # EOS goes before the stop token of the same id
        ([3], {}, (STOP, None)),
        ([7], {}, (STOP, 7)),
        ([2], {"eos": ()}, (STOP, 2)),
        ([5, 5, 5, 5], {}, (LENGTH, None)),
        ([5, 5, 5, 7], {}, (STOP, 7)),  # stop goes before length
        ([5, 2], {"min_tokens": 3}, None),
        ([5, 7], {"min_tokens": 3}, None),
        ([5, 5, 2], {"min_tokens": 3}, (STOP, None)),
        ([5, 5, 5, 5], {"max_tokens": 100}, None),
        ([5] * 7, {"max_tokens": 100}, (LENGTH, None)),  # 10 tokens with the prompt
        ([5] * 7, {"max_tokens": 100, "min_tokens": 50}, (LENGTH, None)),
    ],
)
def test_order_of_stop_rules(outputs, params, expected):
    assert find_stop(make_sequence(outputs, **params), max_len=10) == expected


def test_stop_token_stays_in_the_output():
    engine = ToyEngine(make_limits(), num_blocks=20, depth=1)
    sequence = make_sequences("r", [1, 2], max_tokens=20, stop_token_ids=tuple(range(23)))[0]
    engine.add([sequence])
    engine.drain()
    assert sequence.output_token_ids == [sequence.stop_reason]
    assert sequence.finish_reason is STOP


def test_stop_string_replaces_length_but_nothing_else():
    engine = ToyEngine(make_limits(), num_blocks=20, depth=0)
    sequence = make_sequences("r", [1], max_tokens=1)[0]
    engine.add([sequence])
    engine.drain()
    engine.scheduler.finish(sequence, FinishReason.ABORT)
    assert sequence.finish_reason is LENGTH
    engine.scheduler.finish(sequence, STOP, "the end")
    assert (sequence.finish_reason, sequence.stop_reason) == (STOP, "the end")
    engine.scheduler.finish(sequence, STOP, "another")
    assert sequence.stop_reason == "the end"
