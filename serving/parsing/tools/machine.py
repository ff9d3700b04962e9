"""`Machine`: what the parsers of tool calls have in common, a state that eats text."""

from __future__ import annotations

from collections.abc import Callable

from serving.parsing.deltas import Delta
from serving.parsing.emitter import Emitter

State = Callable[[str, int], int]


class Machine:
    """A parser whose state is a method: it takes a text and a position, and returns the position where to go on.

    A state consumes something or changes the state; it looks at each character once, so the whole is linear, and it
    keeps what is not certain itself, so cuts do not matter.

    Args:
        emitter: takes what is found.
        state: the first state.
    """

    def __init__(self, emitter: Emitter, state: State) -> None:
        self._emitter = emitter
        self._state = state

    def feed(self, text: str) -> list[Delta]:
        """As `OutputParser`."""
        position = 0
        while position < len(text):
            position = self._state(text, position)
        return self._emitter.take()

    def finish(self) -> list[Delta]:
        """As `OutputParser`."""
        self._end()
        return self._emitter.finish()

    def _end(self) -> None:
        """The text is over: give out what the state holds."""
        raise NotImplementedError
