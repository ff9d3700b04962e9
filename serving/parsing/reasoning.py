"""Reasoning that a model writes before its answer: `<think>…</think>` and the like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serving.parsing.deltas import Delta, OutputParser, ReasoningDelta
from serving.parsing.markers import Expected, MarkerFinder


@dataclass(frozen=True)
class ReasoningStyle:
    """How a family of models marks reasoning.

    Attributes:
        begin, end: the marks.
        always: an answer begins with reasoning even where nothing marks its beginning; else only if the answer, or the
            end of the prompt, is the mark.
        needs_special_tokens: the marks are special tokens, which have no text unless `skip_special_tokens` is off.
    """

    begin: str
    end: str
    always: bool
    needs_special_tokens: bool

    def begins_open(self, prompt_text: str) -> bool:
        """True if the answer to a prompt goes on with reasoning, before anything of it is there."""
        prompt = prompt_text.rstrip()
        return prompt.endswith(self.begin) or (self.always and not prompt.endswith(self.end))


REASONING_STYLES: Mapping[str, ReasoningStyle] = {
    "deepseek_r1": ReasoningStyle("<think>", "</think>", always=True, needs_special_tokens=False),
    "qwen3": ReasoningStyle("<think>", "</think>", always=False, needs_special_tokens=False),
    "mistral": ReasoningStyle("[THINK]", "[/THINK]", always=False, needs_special_tokens=True),
}


class ReasoningParser:
    """Splits off the reasoning; gives the rest to another parser.

    Whitespace around the reasoning and before the answer separates them and is left out. Reasoning that never ends is
    reasoning all the same, and the answer is empty.

    Args:
        style: the marks.
        prompt_text: the end of the prompt, where its template may have opened or closed the reasoning.
        answer: parses what is not reasoning.
    """

    def __init__(self, style: ReasoningStyle, prompt_text: str, answer: OutputParser) -> None:
        self._answer = answer
        self._open_at_start = style.begins_open(prompt_text)
        self._begin = Expected(style.begin)
        self._end = MarkerFinder(style.end)
        self._state = self._start
        self._spaces: list[str] = []  # held back until it is known what they lead to
        self._any = False  # there was reasoning

    def feed(self, text: str) -> list[Delta]:
        """As `OutputParser`."""
        return self._state(text) if text else []

    def _start(self, text: str) -> list[Delta]:
        position = 0
        if not self._begin.seen:
            stripped = text.lstrip()
            position = len(text) - len(stripped)
            self._spaces.append(text[:position])
            if not stripped:
                return []
        position, matches = self._begin.match(text, position)
        if matches is None:
            return []
        if matches:
            self._spaces = []
            self._state = self._reasoning
            return self.feed(text[position:])
        before = "".join(self._spaces) + self._begin.seen
        self._spaces = []
        self._state = self._reasoning if self._open_at_start else self._answer.feed
        return self.feed(before) + self.feed(text[position:])

    def _reasoning(self, text: str) -> list[Delta]:
        before, found, position = self._end.find(text, 0)
        deltas = self._told(before)
        if found:
            self._spaces = []
            self._state = self._after
            deltas += self.feed(text[position:])
        return deltas

    def _told(self, text: str) -> list[Delta]:
        """Reasoning but for whitespace at its beginning and, so far, its end."""
        text = text if self._any else text.lstrip()
        stripped = text.rstrip()
        if not stripped:
            if text:
                self._spaces.append(text)
            return []
        self._any = True
        delta = ReasoningDelta("".join(self._spaces) + stripped)
        self._spaces = [text[len(stripped) :]]
        return [delta]

    def _after(self, text: str) -> list[Delta]:
        text = text.lstrip()
        if not text:
            return []
        self._state = self._answer.feed
        return self._answer.feed(text)

    def finish(self) -> list[Delta]:
        """As `OutputParser`."""
        deltas: list[Delta] = []
        if self._state == self._start:
            held = "".join(self._spaces) + self._begin.seen
            self._spaces = []
            self._state = self._reasoning if self._open_at_start else self._answer.feed
            deltas += self.feed(held)
        if self._state == self._reasoning:
            deltas += self._told(self._end.release())
        return deltas + self._answer.finish()
