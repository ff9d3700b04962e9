"""The scanner agrees with Python's own parser about what is JSON, and stops where it ends."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from serving.parsing.json_scanner import Event, JsonScanner

_PARTS = (
    '"',
    "\\",
    "u00e9",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    " ",
    "-",
    "0",
    "1",
    ".",
    "e",
    "+",
    "true",
    "null",
    "a",
    "\n",
    '"k":',
)
_TEXTS = st.lists(st.sampled_from(_PARTS), max_size=14).map(lambda parts: "[" + "".join(parts))
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def _scan(text: str) -> tuple[int, Event]:
    """By characters; returns where the value ended or cannot go on."""
    scanner, position = JsonScanner(), 0
    while position < len(text):
        end, event = scanner.scan(text[: position + 1], position)
        position = end
        if event in (Event.END, Event.INVALID):
            return position, event
    return position, Event.MORE


def _refuse(constant: str) -> None:
    raise ValueError(constant)


@given(_TEXTS)
def test_agrees_with_json(text: str) -> None:
    """Valid and complete, or not: as `json` says."""
    end, event = _scan(text)
    decoder = json.JSONDecoder(parse_constant=_refuse)
    try:
        _, expected = decoder.raw_decode(text)
    except ValueError:
        assert event is not Event.END
    else:
        assert (end, event) == (expected, Event.END)


@given(
    st.dictionaries(st.text(max_size=8), _JSON, min_size=1, max_size=4), st.sampled_from([None, 1]), st.text(max_size=3)
)
def test_tells_of_members(value: dict[str, object], indent: int | None, rest: str) -> None:
    """Keys and values of the outermost object are told apart exactly."""
    text = json.dumps(value, indent=indent)
    scanner, position, begun = JsonScanner(), 0, 0
    pieces: list[str] = []
    while True:
        position, event = scanner.scan(text + rest, position)
        if event in (Event.KEY, Event.VALUE):
            begun = position
        elif event in (Event.KEY_END, Event.VALUE_END):
            pieces.append(text[begun:position])
        else:
            break
    assert (position, event) == (len(text), Event.END)
    members = [json.loads(piece) for piece in pieces]
    assert dict(zip(members[::2], members[1::2], strict=True)) == value
