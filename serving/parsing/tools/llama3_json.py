"""Calls of Llama 3.1 and later: the answer is `{"name": …, "parameters": {…}}`, or has it after `<|python_tag|>`."""

from __future__ import annotations

from serving.parsing.emitter import Emitter
from serving.parsing.json_scanner import WHITESPACE
from serving.parsing.markers import MarkerFinder
from serving.parsing.tools.calls import CallReader, CallRules, Status
from serving.parsing.tools.machine import Machine

_TAG = "<|python_tag|>"
_KEYS = frozenset({"name", "parameters", "arguments", "type", "function", "id"})


class Llama3JsonParser(Machine):
    """Calls at the beginning of an answer or after the tag; more follow with or without `;` between them.

    Nothing else marks a call, so its name must be that of a tool and it must have arguments: an answer that is JSON by
    itself stays content. What follows the last call is content again.
    """

    def __init__(self, emitter: Emitter, names: frozenset[str]) -> None:
        super().__init__(emitter, self._before_call)
        self._tag = MarkerFinder(_TAG)
        self._rules = CallRules(names=names, keys=_KEYS, needs_arguments=True)
        self._opening: list[str] = []  # before the object of a call: content, if there is no call
        self._may_separate = False  # a call came last, and no `;` yet
        self._reader = CallReader(emitter, self._rules)

    def _before_call(self, text: str, position: int) -> int:
        match = WHITESPACE.match(text, position)
        end = position if match is None else match.end()
        self._opening.append(text[position:end])
        if end == len(text):
            return end
        if text[end] == ";" and self._may_separate:
            self._may_separate = False
            self._opening.append(";")
            return end + 1
        if text[end] == "{":
            self._reader = CallReader(self._emitter, self._rules)
            self._state = self._call
        else:
            self._give_up()
        return end

    def _give_up(self) -> None:
        self._emitter.content("".join(self._opening))
        self._opening = []
        self._state = self._text

    def _text(self, text: str, position: int) -> int:
        before, found, position = self._tag.find(text, position)
        self._emitter.content(before)
        if found:
            self._opening = [_TAG]
            self._may_separate = False
            self._state = self._before_call
        return position

    def _call(self, text: str, position: int) -> int:
        position, status = self._reader.read(text, position)
        if status is Status.DONE:
            self._opening = []
            self._may_separate = True
            self._state = self._before_call
        elif status is Status.FAILED:
            self._opening.append(self._reader.consumed)
            self._give_up()
        elif status is Status.BROKEN:
            self._state = self._broken
        return position

    def _broken(self, text: str, position: int) -> int:
        self._emitter.arguments(text[position:])
        return len(text)

    def _end(self) -> None:
        if self._state == self._call and not self._reader.is_certain:
            self._opening.append(self._reader.consumed)
        if self._emitter.num_calls and not "".join(self._opening).strip(" \t\n\r;"):
            self._opening = []  # a separator after the last call
        self._give_up()
        self._emitter.content(self._tag.release())
