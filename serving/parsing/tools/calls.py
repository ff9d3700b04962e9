"""`CallReader`: one call written as a JSON object, `{"name": …, "arguments": {…}}`, streamed as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from serving.parsing.emitter import Emitter
from serving.parsing.json_scanner import Event, JsonScanner

_NAME = "name"
_ARGUMENTS = ("arguments", "parameters")


class Status(Enum):
    """How far a call is."""

    MORE = auto()  # the text is used up
    DONE = auto()  # the call was told of, whole; the object ended, or broke off after the arguments
    FAILED = auto()  # this is no call: nothing was told of, `consumed` is content
    BROKEN = auto()  # the call was told of, but its arguments are not JSON from here on


@dataclass(frozen=True)
class CallRules:
    """What counts as a call.

    Attributes:
        names: of the tools that there are; None = any name will do.
        keys: keys that an object may begin with, before it is certain that it is a call; None = any. It lets an answer
            that is JSON itself be told from a call early.
        needs_arguments: False: without arguments it is a call with `{}`.
    """

    names: frozenset[str] | None = None
    keys: frozenset[str] | None = None
    needs_arguments: bool = False

    def allows(self, name: object) -> bool:
        """True if it may be the name of a call."""
        return is_name(name) and (self.names is None or name in self.names)


class CallReader:
    """Reads one call. It is certain once its name is known and its arguments have begun; from then on they stream.

    Args:
        emitter: is told of the call.
        rules: what counts as one.
    """

    def __init__(self, emitter: Emitter, rules: CallRules) -> None:
        self._emitter = emitter
        self._rules = rules
        self._scanner = JsonScanner()
        self._consumed: list[str] = []
        self._captured: list[str] | None = None  # a key or value that is being read
        self._key = ""
        self._name: str | None = None
        self._arguments: str | None = None  # complete, but the name is not known yet
        self._streams = False  # what comes is arguments
        self.is_certain = False
        self._on: dict[Event, Callable[[str], Status]] = {
            Event.KEY: self._capture,
            Event.KEY_END: self._key_ended,
            Event.VALUE: self._value_began,
            Event.VALUE_END: self._value_ended,
            Event.END: self._ended,
            Event.INVALID: self._broke,
        }

    @property
    def consumed(self) -> str:
        """All text that was read, while it is not certain that this is a call."""
        return "" if self.is_certain else "".join(self._consumed)

    def read(self, text: str, start: int) -> tuple[int, Status]:
        """Go on from `text[start]`; the first character of all must be `{`. Returns where it stopped, and why."""
        while True:
            position, event = self._scanner.scan(text, start)
            piece = text[start:position]
            if not self.is_certain:
                self._consumed.append(piece)
            if self._streams:
                self._emitter.arguments(piece)
            elif self._captured is not None:
                self._captured.append(piece)
            if event is Event.MORE:
                return position, Status.MORE
            status = self._on[event](text[position : position + 1])
            if status is not Status.MORE:
                return position, status
            start = position

    def _capture(self, _: str) -> Status:
        self._captured = []
        return Status.MORE

    def _take(self) -> str:
        captured, self._captured = "".join(self._captured or ()), None
        return captured

    def _key_ended(self, _: str) -> Status:
        self._key = json.loads(self._take())
        keys = self._rules.keys
        return Status.FAILED if keys is not None and not self.is_certain and self._key not in keys else Status.MORE

    def _value_began(self, first: str) -> Status:
        if self.is_certain or self._key not in (_NAME, *_ARGUMENTS):
            return Status.MORE
        if self._key in _ARGUMENTS and self._arguments is None and first == "{" and self._name is not None:
            self._begin()
            self._streams = True
            return Status.MORE
        return self._capture(first)

    def _value_ended(self, _: str) -> Status:
        self._streams = False
        if self._captured is None:
            return Status.MORE
        value = self._take().strip()
        if self._key == _NAME and self._name is None:
            name = json.loads(value) if value.startswith('"') else None
            if not self._rules.allows(name):
                return Status.FAILED
            self._name = name
        elif self._key in _ARGUMENTS and self._arguments is None:
            self._arguments = _as_object(value)
            if self._arguments is None:
                return Status.FAILED
        if self._name is not None and self._arguments is not None:
            self._begin()
            self._emitter.arguments(self._arguments)
        return Status.MORE

    def _ended(self, _: str) -> Status:
        if self.is_certain:
            return Status.DONE
        if self._name is None or self._rules.needs_arguments:
            return Status.FAILED
        self._begin()
        self._emitter.arguments("{}")
        return Status.DONE

    def _broke(self, _: str) -> Status:
        if not self.is_certain:
            return Status.FAILED
        return Status.BROKEN if self._streams else Status.DONE

    def _begin(self) -> None:
        assert self._name is not None
        self._emitter.begin_call(self._name)
        self.is_certain = True
        self._consumed.clear()


def is_name(name: object) -> bool:
    """True for a text that can be sent as a name: not empty, valid Unicode."""
    return isinstance(name, str) and bool(name) and is_unicode(name)


def is_unicode(text: str) -> bool:
    """False if it has lone surrogates, which JSON and Python can write but no reply can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_object(value: str) -> str | None:
    """Arguments as the JSON text of an object; they may be written as a string that holds it, or as null."""
    if value.startswith("{"):
        return value
    if value == "null":
        return "{}"
    if value.startswith('"'):
        inner = json.loads(value)
        scanner = JsonScanner()
        end, event = scanner.scan(inner.strip(), 0)
        while event not in (Event.END, Event.INVALID, Event.MORE):
            end, event = scanner.scan(inner.strip(), end)
        if event is Event.END and end == len(inner.strip()) and inner.strip()[0] == "{" and is_unicode(inner):
            return inner.strip()
    return None
