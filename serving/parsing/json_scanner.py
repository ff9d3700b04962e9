"""`JsonScanner`: follows one JSON value through text that comes in pieces, without building it.

It knows at each character whether the text can still become valid JSON (RFC 8259), and tells where the members of the
outermost object begin and end. Each character is looked at once, wherever the text is cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum, auto

WHITESPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_DIGITS = re.compile(r"[0-9]*")
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPES = frozenset('"\\/bfnrt')
_LITERALS = {"t": "true", "f": "false", "n": "null"}


class Event(Enum):
    """Why a scan came back. Members are those of the outermost object."""

    MORE = auto()  # the text is used up
    KEY = auto()  # a member's key begins here, at its quote
    KEY_END = auto()  # it ended just before
    VALUE = auto()  # a member's value begins here
    VALUE_END = auto()  # it ended just before
    END = auto()  # the whole value ended just before
    INVALID = auto()  # the character here cannot be


class JsonScanner:
    """Scans one value. Numbers outside an object or array have no end of their own, so give it an object or array."""

    def __init__(self) -> None:
        self._closers: list[str] = []  # of the open objects and arrays, outermost first
        self._announced = False  # the key or value that comes next has been told of
        self._in_key = False
        self._rest = ""  # of a literal
        self._num_hex = 0
        self._number = ""  # the part of a number that we are in: one of - 0 i . f e + x
        self._event = Event.MORE
        self._step: Callable[[str, int], int] = self._value

    def scan(self, text: str, start: int) -> tuple[int, Event]:
        """Go on from `text[start]` to the next event.

        Returns:
            (where it stopped, why). After END or INVALID the scanner is done.
        """
        position, end = start, len(text)
        self._event = Event.MORE
        while position < end and self._event is Event.MORE:
            position = self._step(text, position)
        return position, self._event

    def _value(self, text: str, position: int) -> int:
        position = _end(WHITESPACE, text, position)
        if position == len(text):
            return position
        if len(self._closers) == 1 and self._closers[0] == "}" and not self._announced:
            self._announced = True
            self._event = Event.VALUE
            return position
        character = text[position]
        if character == '"':
            self._in_key = False
            self._step = self._string
        elif character == "{":
            self._closers.append("}")
            self._step = self._first_key
        elif character == "[":
            self._closers.append("]")
            self._step = self._first_item
        elif character in _LITERALS:
            self._rest = _LITERALS[character][1:]
            self._step = self._literal
        elif character in "-0123456789":
            self._number = character if character in "-0" else "i"
            self._step = self._in_number
        else:
            self._event = Event.INVALID
            return position
        return position + 1

    def _first_item(self, text: str, position: int) -> int:
        position = _end(WHITESPACE, text, position)
        if position == len(text):
            return position
        if text[position] == "]":
            return self._close(position)
        self._step = self._value
        return position

    def _first_key(self, text: str, position: int) -> int:
        position = _end(WHITESPACE, text, position)
        if position == len(text):
            return position
        if text[position] == "}":
            return self._close(position)
        self._step = self._key
        return position

    def _key(self, text: str, position: int) -> int:
        position = _end(WHITESPACE, text, position)
        if position == len(text):
            return position
        if text[position] != '"':
            self._event = Event.INVALID
            return position
        if len(self._closers) == 1 and not self._announced:
            self._announced = True
            self._event = Event.KEY
            return position
        self._in_key = True
        self._step = self._string
        return position + 1

    def _string(self, text: str, position: int) -> int:
        position = _end(_PLAIN, text, position)
        if position == len(text):
            return position
        if text[position] == '"':
            if self._in_key:
                self._step = self._colon
                if len(self._closers) == 1:
                    self._event = Event.KEY_END
            else:
                self._value_ended()
        elif text[position] == "\\":
            self._step = self._escape
        else:
            self._event = Event.INVALID
            return position
        return position + 1

    def _escape(self, text: str, position: int) -> int:
        if text[position] == "u":
            self._num_hex = 4
            self._step = self._unicode
        elif text[position] in _ESCAPES:
            self._step = self._string
        else:
            self._event = Event.INVALID
            return position
        return position + 1

    def _unicode(self, text: str, position: int) -> int:
        if text[position] not in _HEX:
            self._event = Event.INVALID
            return position
        self._num_hex -= 1
        if self._num_hex == 0:
            self._step = self._string
        return position + 1

    def _colon(self, text: str, position: int) -> int:
        position = _end(WHITESPACE, text, position)
        if position == len(text):
            return position
        if text[position] != ":":
            self._event = Event.INVALID
            return position
        self._announced = False
        self._step = self._value
        return position + 1

    def _literal(self, text: str, position: int) -> int:
        if text[position] != self._rest[0]:
            self._event = Event.INVALID
            return position
        self._rest = self._rest[1:]
        if not self._rest:
            self._value_ended()
        return position + 1

    def _in_number(self, text: str, position: int) -> int:
        """Parts: "-" sign, "0" a zero, "i" digits, "." point, "f" fraction, "e" its e, "+" its sign, "x" exponent."""
        if self._number in "ifx":
            position = _end(_DIGITS, text, position)
            if position == len(text):
                return position
        character, part = text[position], self._number
        if "0" <= character <= "9" and part in "-.e+":
            self._number = {"-": "0" if character == "0" else "i", ".": "f"}.get(part, "x")
        elif character == "." and part in "0i":
            self._number = "."
        elif character in "eE" and part in "0if":
            self._number = "e"
        elif character in "+-" and part == "e":
            self._number = "+"
        elif part in "0ifx":
            self._value_ended()
            return position
        else:
            self._event = Event.INVALID
            return position
        return position + 1

    def _after(self, text: str, position: int) -> int:
        position = _end(WHITESPACE, text, position)
        if position == len(text):
            return position
        if text[position] == self._closers[-1]:
            return self._close(position)
        if text[position] != ",":
            self._event = Event.INVALID
            return position
        self._announced = False
        self._step = self._key if self._closers[-1] == "}" else self._value
        return position + 1

    def _close(self, position: int) -> int:
        self._closers.pop()
        self._value_ended()
        return position + 1

    def _value_ended(self) -> None:
        self._step = self._after
        if not self._closers:
            self._event = Event.END
        elif len(self._closers) == 1 and self._closers[0] == "}":
            self._event = Event.VALUE_END


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return position if match is None else match.end()
