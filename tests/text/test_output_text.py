"""Stop strings across tokens, hold-back, min_tokens: streamed and at once give the same."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling_params import SamplingParams
from engine.text.output_text import OutputText
from engine.text.stop import StopMatch, find_stop
from engine.text.tokenizer import Tokenizer

STOPS = st.lists(st.text(alphabet="the boa.\né🍞", min_size=1, max_size=5), max_size=4)
TEXT = st.text(alphabet="the boat. \né🍞日", max_size=40)


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """The specification: read character by character; at the first that completes stop strings, take the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return end, longest
    return None


def split(token_ids: list[int], cuts: Sequence[int]) -> list[list[int]]:
    bounds = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    return [token_ids[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]


def run(output: OutputText, groups: list[list[int]]) -> str:
    pieces = [output.push(group, finished=index == len(groups) - 1) for index, group in enumerate(groups)]
    assert "".join(pieces) == output.text
    return output.text


@pytest.mark.parametrize("name", ["byte_level", "sentence_piece"])
@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 60), max_size=8), include=st.booleans())
@settings(max_examples=250, deadline=None)
def test_streamed_is_as_specified(
    request: pytest.FixtureRequest, name: str, text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    prompt, token_ids = tokenizer.encode("x"), tokenizer.encode(text, add_special_tokens=False)
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    whole = tokenizer.decode([*prompt, *token_ids])[len(tokenizer.decode(prompt)) :]
    expected, match = whole, first_stop(whole, stops)
    if match is not None:
        end, stop = match
        expected = whole[: end if include else end - len(stop)]
    output = OutputText(tokenizer, prompt, params)
    assert run(output, split(token_ids, cuts)) == expected
    assert output.stop_match == (match[1] if match else None)


@given(
    token_ids=st.lists(st.integers(0, 330), max_size=30),
    stops=st.lists(st.text(alphabet="the aob\ufffd", min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    min_tokens=st.integers(0, 10),
    include=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_any_split_gives_the_same(
    byte_level: Tokenizer, token_ids: list[int], stops: list[str], cuts: list[int], min_tokens: int, include: bool
) -> None:
    params = SamplingParams(stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include)
    at_once, streamed = OutputText(byte_level, [70], params), OutputText(byte_level, [70], params)
    assert run(at_once, [token_ids]) == run(streamed, split(token_ids, cuts))
    assert (at_once.stop_match, at_once.num_tokens) == (streamed.stop_match, streamed.num_tokens)
    assert at_once.stop_match is None or at_once.num_tokens > min_tokens


def test_holds_back_one_less_than_the_longest_stop(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("abcdefgh")
    held = OutputText(byte_level, [70], SamplingParams(stop=["xyzw", "q"]))
    assert [held.push([token_id]) for token_id in ids] == ["", "", "", "a", "b", "c", "d", "e"]
    assert held.text == "abcde"
    assert held.push([], finished=True) == "fgh"
    free = OutputText(byte_level, [70], SamplingParams())
    assert [free.push([token_id]) for token_id in ids] == list("abcdefgh")
    included = OutputText(byte_level, [70], SamplingParams(stop="xyzw", include_stop_str_in_output=True))
    assert [included.push([token_id]) for token_id in ids] == list("abcdefgh")


def test_tokens_after_the_match_are_dropped(byte_level: Tokenizer) -> None:
    output = OutputText(byte_level, [70], SamplingParams(stop="cd"))
    assert output.push(byte_level.encode("abcdef")) == "ab"
    assert (output.stop_match, output.num_tokens) == ("cd", 4)
    assert output.push(byte_level.encode("gh"), finished=True) == ""
    assert (output.text, output.num_tokens) == ("ab", 4)


def test_stop_token_has_no_text_unless_included(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("ab")
    for include, expected in ((False, "a"), (True, "ab")):
        output = OutputText(byte_level, [70], SamplingParams(include_stop_str_in_output=include))
        assert output.push(ids, finished=True, stop_token=True) == expected
        assert output.num_tokens == 2


def test_stop_string_over_the_end_of_a_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a🍞b")
    output = OutputText(byte_level, [70], SamplingParams(stop="🍞"))
    pieces = [output.push([token_id]) for token_id in ids]
    assert "".join(pieces) == "a" and output.stop_match == "🍞"


def test_min_tokens_lets_an_early_stop_string_pass(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("abab")
    output = OutputText(byte_level, [70], SamplingParams(stop="ab", min_tokens=2))
    assert output.push(ids, finished=True) == "ab"
    assert (output.stop_match, output.num_tokens) == ("ab", 4)


@pytest.mark.parametrize(
    ("text", "num_seen", "stops", "expected"),
    [
        ("abc", 0, ["c", "bc"], StopMatch("bc", 1, 3)),
        ("abc", 0, ["c", "ab"], StopMatch("ab", 0, 2)),
        ("aab", 2, ["a"], None),
        ("aab", 1, ["aa"], StopMatch("aa", 0, 2)),
        ("aaaa", 3, ["aa"], StopMatch("aa", 2, 4)),
        ("", 0, ["a"], None),
        ("abc", 3, ["abc"], None),
    ],
)
def test_find_stop(text: str, num_seen: int, stops: list[str], expected: StopMatch | None) -> None:
    assert find_stop(text, num_seen, stops) == expected
    assert find_stop(text, num_seen, stops[::-1]) == expected
