"""`CallList`: calls in a JSON array, `[{"name": …, "arguments": {…}}, …]`, as Mistral writes them and as we enforce."""

from __future__ import annotations

from collections.abc import Callable

from serving.parsing.emitter import Emitter
from serving.parsing.json_scanner import WHITESPACE
from serving.parsing.tools.calls import CallReader, CallRules, Status

_State = Callable[[str, int], tuple[int, Status]]


class CallList:
    """Reads one array of calls, or one call without an array.

    Args:
        emitter: is told of the calls.
        rules: what counts as one.

    Attributes:
        num_calls: how many were told of.
    """

    def __init__(self, emitter: Emitter, rules: CallRules) -> None:
        self._emitter = emitter
        self._rules = rules
        self._held: list[str] = []  # since the last call
        self._is_array = False
        self.num_calls = 0
        self._reader: CallReader | None = None
        self._state: _State = self._open

    @property
    def consumed(self) -> str:
        """Text that was read since the last certain call."""
        return "".join(self._held) + (self._reader.consumed if self._reader else "")

    def read(self, text: str, start: int) -> tuple[int, Status]:
        """Go on from `text[start]`; statuses are those of `CallReader`, but FAILED may come after calls."""
        position, status = start, Status.MORE
        while position < len(text) and status is Status.MORE:
            position, status = self._state(text, position)
        return position, status

    def _skip_space(self, text: str, position: int) -> int:
        match = WHITESPACE.match(text, position)
        end = position if match is None else match.end()
        self._held.append(text[position:end])
        return end

    def _open(self, text: str, position: int) -> tuple[int, Status]:
        position = self._skip_space(text, position)
        if position == len(text):
            return position, Status.MORE
        if text[position] == "[":
            self._is_array = True
            self._held.append("[")
            self._state = self._item
            return position + 1, Status.MORE
        self._state = self._item
        return position, Status.MORE

    def _item(self, text: str, position: int) -> tuple[int, Status]:
        position = self._skip_space(text, position)  # there is something held from here on, if only ""
        if position == len(text):
            return position, Status.MORE
        if text[position] != "{":
            return position, Status.FAILED
        self._reader = CallReader(self._emitter, self._rules)
        self._state = self._call
        return position, Status.MORE

    def _call(self, text: str, position: int) -> tuple[int, Status]:
        assert self._reader is not None
        position, status = self._reader.read(text, position)
        if self._held and self._reader.is_certain:
            self._held = []
            self.num_calls += 1
        if status is Status.DONE and self._is_array:
            self._reader = None
            self._state = self._separator
            return position, Status.MORE
        return position, status

    def _separator(self, text: str, position: int) -> tuple[int, Status]:
        position = self._skip_space(text, position)
        if position == len(text):
            return position, Status.MORE
        if text[position] == "]":
            return position + 1, Status.DONE
        if text[position] != ",":
            return position, Status.FAILED
        self._held.append(",")
        self._state = self._item
        return position + 1, Status.MORE
