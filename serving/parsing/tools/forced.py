"""Answers whose form `serving/parsing/enforce.py` fixes: an array of calls, or the arguments of a known call."""

from __future__ import annotations

from serving.parsing.emitter import Emitter
from serving.parsing.json_scanner import WHITESPACE
from serving.parsing.tools.call_list import CallList
from serving.parsing.tools.calls import CallRules, Status
from serving.parsing.tools.machine import Machine


class RequiredCallsParser(Machine):
    """The answer is `[{"name": …, "parameters": {…}}, …]`; what is not is content."""

    def __init__(self, emitter: Emitter, names: frozenset[str]) -> None:
        super().__init__(emitter, self._calls)
        self._list = CallList(emitter, CallRules(names=names))

    def _calls(self, text: str, position: int) -> int:
        position, status = self._list.read(text, position)
        if status is Status.FAILED:
            self._emitter.content(self._list.consumed)
            self._state = self._text
        elif status is Status.DONE:
            self._state = self._text
        elif status is Status.BROKEN:
            self._state = self._broken
        return position

    def _text(self, text: str, position: int) -> int:
        self._emitter.content(text[position:])
        return len(text)

    def _broken(self, text: str, position: int) -> int:
        self._emitter.arguments(text[position:])
        return len(text)

    def _end(self) -> None:
        if self._state == self._calls:
            self._emitter.content(self._list.consumed)


class NamedCallParser(Machine):
    """The answer is the arguments of one call, whose name is known beforehand."""

    def __init__(self, emitter: Emitter, name: str) -> None:
        super().__init__(emitter, self._begin)
        self._name = name

    def _begin(self, text: str, position: int) -> int:
        match = WHITESPACE.match(text, position)
        position = position if match is None else match.end()
        if position < len(text):
            self._emitter.begin_call(self._name)
            self._state = self._arguments
        return position

    def _arguments(self, text: str, position: int) -> int:
        self._emitter.arguments(text[position:])
        return len(text)

    def _end(self) -> None:
        pass
