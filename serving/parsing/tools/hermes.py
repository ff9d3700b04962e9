"""Calls of Hermes, Qwen2.5, Qwen3 and SmolLM3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

from serving.parsing.emitter import Emitter
from serving.parsing.json_scanner import WHITESPACE
from serving.parsing.markers import Expected, MarkerFinder
from serving.parsing.tools.calls import CallReader, CallRules, Status
from serving.parsing.tools.machine import Machine

_BEGIN = "<tool_call>"
_END = "</tool_call>"
_RULES = CallRules()


class HermesParser(Machine):
    """Content around any number of tagged calls.

    Between the tags there may be several objects, and surplus closing brackets are passed over: models write both. A
    missing end tag ends nothing but the text. What stands between the tags and is no call is content, tags included.
    """

    def __init__(self, emitter: Emitter, names: frozenset[str]) -> None:
        super().__init__(emitter, self._text)
        self._begin = MarkerFinder(_BEGIN)
        self._end_of_broken = MarkerFinder(_END)
        self._end_tag = Expected(_END)
        self._opening: list[str] = []  # before the object of a call: content, if there is no call
        self._reader = CallReader(emitter, _RULES)

    def _text(self, text: str, position: int) -> int:
        before, found, position = self._begin.find(text, position)
        self._emitter.content(before)
        if found:
            self._opening = [_BEGIN]
            self._state = self._open
        return position

    def _open(self, text: str, position: int) -> int:
        end = self._skip_space(text, position)
        if end < len(text):
            self._start_call() if text[end] == "{" else self._give_up()
        return end

    def _skip_space(self, text: str, position: int) -> int:
        match = WHITESPACE.match(text, position)
        end = position if match is None else match.end()
        self._opening.append(text[position:end])
        return end

    def _start_call(self) -> None:
        self._reader = CallReader(self._emitter, _RULES)
        self._state = self._call

    def _give_up(self) -> None:
        self._emitter.content("".join(self._opening))
        self._opening = []
        self._state = self._text

    def _call(self, text: str, position: int) -> int:
        position, status = self._reader.read(text, position)
        if status is Status.DONE:
            self._opening = []
            self._end_tag = Expected(_END)
            self._state = self._tail
        elif status is Status.FAILED:
            self._opening.append(self._reader.consumed)
            self._give_up()
        elif status is Status.BROKEN:
            self._state = self._broken
        return position

    def _tail(self, text: str, position: int) -> int:
        if not self._end_tag.seen:
            position = self._skip_space(text, position)
            if position == len(text) or text[position] in "}]":
                return min(position + 1, len(text))
            if text[position] == "{":
                self._start_call()
                return position
        position, matches = self._end_tag.match(text, position)
        if matches:
            self._state = self._text
        elif matches is False:
            self._give_up()
            self._text(self._end_tag.seen, 0)  # it may be the beginning of the next call
        return position

    def _broken(self, text: str, position: int) -> int:
        before, found, position = self._end_of_broken.find(text, position)
        self._emitter.arguments(before)
        if found:
            self._state = self._text
        return position

    def _end(self) -> None:
        if self._state == self._tail:
            self._give_up()
            self._emitter.content(self._end_tag.seen)
        elif self._state == self._broken:
            self._emitter.arguments(self._end_of_broken.release())
        else:
            if self._state == self._call and not self._reader.is_certain:
                self._opening.append(self._reader.consumed)
            if self._state == self._open or (self._state == self._call and not self._reader.is_certain):
                self._give_up()
            self._emitter.content(self._begin.release())
