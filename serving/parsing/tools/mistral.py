"""Calls of Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and newer `[TOOL_CALLS]name[ARGS]{…}`."""

from __future__ import annotations

import re

from serving.parsing.emitter import Emitter
from serving.parsing.json_scanner import WHITESPACE, Event, JsonScanner
from serving.parsing.markers import Expected, MarkerFinder
from serving.parsing.tools.call_list import CallList
from serving.parsing.tools.calls import CallRules, Status
from serving.parsing.tools.machine import Machine

_BEGIN = "[TOOL_CALLS]"
_CALL_ID = "[CALL_ID]"
_ARGS = "[ARGS]"
_NAME = re.compile(r"[A-Za-z0-9_.:/-]*")
_ID = re.compile(r"[A-Za-z0-9]*")
_RULES = CallRules()


class MistralParser(Machine):
    """Calls after the marker, in either form; the newer form repeats the marker for each call.

    `[CALL_ID]` between name and arguments gives the call its id. `[ARGS]` may be missing (older tokenizers have none).
    What follows the marker and is no call is content, marker included; what follows the last call is content.
    """

    def __init__(self, emitter: Emitter, names: frozenset[str]) -> None:
        super().__init__(emitter, self._text)
        self._begin = MarkerFinder(_BEGIN)
        self._next_call = MarkerFinder(_BEGIN)  # after arguments that are not JSON
        self._opening: list[str] = []  # since the marker: content, if there is no call
        self._name = ""
        self._id = ""
        self._expected = Expected(_ARGS)
        self._list = CallList(emitter, _RULES)
        self._scanner = JsonScanner()

    def _text(self, text: str, position: int) -> int:
        before, found, position = self._begin.find(text, position)
        self._emitter.content(before)
        if found:
            self._open_call()
        return position

    def _open_call(self) -> None:
        self._opening = [_BEGIN]
        self._name = self._id = ""
        self._state = self._open

    def _give_up(self) -> None:
        self._emitter.content("".join(self._opening))
        self._opening = []
        self._state = self._text

    def _eat(self, pattern: re.Pattern[str], text: str, position: int) -> tuple[str, int]:
        match = pattern.match(text, position)
        eaten = "" if match is None else match.group()
        self._opening.append(eaten)
        return eaten, position + len(eaten)

    def _open(self, text: str, position: int) -> int:
        _, position = self._eat(WHITESPACE, text, position)
        if position < len(text):
            if text[position] in "[{":
                self._list = CallList(self._emitter, _RULES)
                self._state = self._calls
            else:
                self._state = self._named
        return position

    def _calls(self, text: str, position: int) -> int:
        position, status = self._list.read(text, position)
        if status is Status.DONE:
            self._opening = []
            self._state = self._text
        elif status is Status.FAILED:
            self._fail_list()
        elif status is Status.BROKEN:
            self._opening = []
            self._state = self._broken
        return position

    def _fail_list(self) -> None:
        consumed = self._list.consumed
        if self._list.num_calls:
            self._opening = []
        self._opening.append(consumed)
        self._give_up()

    def _named(self, text: str, position: int) -> int:
        eaten, position = self._eat(_NAME, text, position)
        self._name += eaten
        if position < len(text):
            if not self._name:
                self._give_up()
            elif text[position] == "[":
                self._expected = Expected(_CALL_ID)
                self._state = self._marked
            else:
                self._state = self._arguments_begin
        return position

    def _marked(self, text: str, position: int) -> int:
        """`[CALL_ID]` or `[ARGS]`: the second letter tells which."""
        position, matches = self._expected.match(text, position)
        if matches is False and self._expected.seen == "[" and self._expected.marker == _CALL_ID:
            self._expected = Expected(_ARGS)
            self._expected.seen = "["
            position, matches = self._expected.match(text, position)
        if matches is None:
            return position
        if not matches:
            self._give_up()
            self._text(self._expected.seen, 0)  # it may be the beginning of the next call
            return position
        self._opening.append(self._expected.marker)
        self._state = self._call_id if self._expected.marker == _CALL_ID else self._arguments_begin
        return position

    def _call_id(self, text: str, position: int) -> int:
        eaten, position = self._eat(_ID, text, position)
        self._id += eaten
        if position < len(text):
            self._expected = Expected(_ARGS)
            self._state = self._marked if text[position] == "[" else self._arguments_begin
        return position

    def _arguments_begin(self, text: str, position: int) -> int:
        _, position = self._eat(WHITESPACE, text, position)
        if position == len(text):
            return position
        if text[position] != "{":
            self._give_up()
            return position
        self._emitter.begin_call(self._name, self._id or None)
        self._opening = []
        self._scanner = JsonScanner()
        self._state = self._arguments
        return position

    def _arguments(self, text: str, position: int) -> int:
        start, event = position, Event.MORE
        while event not in (Event.END, Event.INVALID) and position < len(text):
            position, event = self._scanner.scan(text, position)
        self._emitter.arguments(text[start:position])
        if event is Event.END:
            self._state = self._text
        elif event is Event.INVALID:
            self._state = self._broken
        return position

    def _broken(self, text: str, position: int) -> int:
        before, found, position = self._next_call.find(text, position)
        self._emitter.arguments(before)
        if found:
            self._open_call()
        return position

    def _end(self) -> None:
        if self._state == self._calls:
            self._fail_list()
        elif self._state == self._broken:
            self._emitter.arguments(self._next_call.release())
        elif self._state == self._marked:
            self._opening.append(self._expected.seen)
        if self._state != self._arguments:
            self._give_up()
        self._emitter.content(self._begin.release())
