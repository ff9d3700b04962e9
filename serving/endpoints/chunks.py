"""The events of a stream. Nearly all of them are one more piece of text: those are a head that never changes, the
JSON of the text, and a tail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

_encode = msgspec.json.encode
_MARK = "\x00"  # stands for the text while head and tail are made; JSON writes it in a way that no name contains
_MARK_JSON = _encode(_MARK)

Choice = Callable[[int, str], dict[str, Any]]


class ChunkMaker:
    """Makes the events of one stream.

    Args:
        envelope: the fields of every event but `choices` and `usage`.
        text_choice: the choice of an event that is only text, from its index and the text.
        usage_in_all: True if every event has `usage`: null, as OpenAI has it with include_usage.
    """

    def __init__(self, envelope: dict[str, Any], text_choice: Choice, *, usage_in_all: bool = False) -> None:
        self._envelope = envelope
        self._text_choice = text_choice
        self._usage = {"usage": None} if usage_in_all else {}
        self._ends: dict[int, tuple[bytes, bytes]] = {}

    def text(self, index: int, text: str) -> bytes:
        """An event with more text of one choice."""
        ends = self._ends.get(index)
        if ends is None:
            head, tail = self.event([self._text_choice(index, _MARK)]).split(_MARK_JSON)
            ends = self._ends[index] = (head, tail)
        return ends[0] + _encode(text) + ends[1]

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None, **more: Any) -> bytes:
        """Any event. `usage` is there if given, or if all events have it."""
        shown = self._usage if usage is None else {"usage": usage}
        return b"data: " + _encode({**self._envelope, "choices": choices, **shown, **more}) + b"\n\n"
