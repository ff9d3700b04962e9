"""Calls written as Python: an answer that is `[f(a=1), g(b="x")]`."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from serving.parsing.emitter import Emitter
from serving.parsing.json_scanner import WHITESPACE
from serving.parsing.tools.calls import is_unicode
from serving.parsing.tools.machine import Machine

_NAME = re.compile(r"[A-Za-z0-9_.-]*")
_KEYWORD = re.compile(r"\s*([^\W\d]\w*)\s*=(?!=)\s*")
_OUTSIDE = re.compile(r"[^\"'()\[\]{},]*")
_IN_STRING = {'"': re.compile(r'[^"\\]*'), "'": re.compile(r"[^'\\]*")}
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_CONSTANTS = {"true": True, "false": False, "null": None}  # JSON's spelling, which models mix in
_MOST_BRACKETS = 60  # open at once; Python's own parser takes no more than 200


class PythonicParser(Machine):
    """An array of calls at the beginning of an answer; what follows it is content.

    Nothing marks a call but its name, which must be that of a tool. Each call is told of when it is complete, since
    only then it is certain that its arguments are literals; what is not stays content from there on.
    """

    def __init__(self, emitter: Emitter, names: frozenset[str]) -> None:
        super().__init__(emitter, self._open)
        self._names = names
        self._held: list[str] = []  # since the last call: content, if no other follows
        self._name = ""
        self._arguments: dict[str, Any] = {}
        self._argument: list[str] = []  # the source of the argument that is being read
        self._closers: list[str] = []
        self._quote = ""
        self._quotes_seen = 0

    def _give_up(self) -> None:
        self._emitter.content("".join([*self._held, *self._argument]))
        self._held, self._argument = [], []
        self._state = self._text

    def _text(self, text: str, position: int) -> int:
        self._emitter.content(text[position:])
        return len(text)

    def _skip_space(self, text: str, position: int) -> int:
        match = WHITESPACE.match(text, position)
        end = position if match is None else match.end()
        self._held.append(text[position:end])
        return end

    def _open(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        if position == len(text):
            return position
        if text[position] != "[":
            self._give_up()
            return position
        self._held.append("[")
        self._state = self._before_name
        return position + 1

    def _before_name(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        if position < len(text):
            self._name = ""
            self._state = self._in_name
        return position

    def _in_name(self, text: str, position: int) -> int:
        match = _NAME.match(text, position)
        eaten = "" if match is None else match.group()
        self._name += eaten
        self._held.append(eaten)
        position += len(eaten)
        if position == len(text):
            return position
        if text[position] != "(" or self._name not in self._names:
            self._give_up()
            return position
        self._held.append("(")
        self._arguments, self._argument, self._closers = {}, [], []
        self._state = self._in_arguments
        return position + 1

    def _in_arguments(self, text: str, position: int) -> int:
        match = _OUTSIDE.match(text, position)
        end = position if match is None else match.end()
        self._argument.append(text[position:end])
        if end == len(text):
            return end
        character = text[end]
        if not self._closers and character in ",)":
            return self._argument_ended(character, end)
        if character in _CLOSERS and len(self._closers) < _MOST_BRACKETS:
            self._closers.append(_CLOSERS[character])
        elif character in "\"'":
            self._quote, self._quotes_seen = character, 1
            self._state = self._string_opens
        elif self._closers and character == self._closers[-1]:
            self._closers.pop()
        elif character != ",":
            self._give_up()
            return end
        self._argument.append(character)
        return end + 1

    def _argument_ended(self, character: str, position: int) -> int:
        source = "".join(self._argument)
        is_last = character == ")"
        if (source.strip() or not is_last) and not self._add(source):
            self._give_up()
            return position
        self._held += [source, character]
        self._argument = []
        if is_last:
            self._tell()
        return position + 1

    def _add(self, source: str) -> bool:
        match = _KEYWORD.match(source)
        if match is None or match.group(1) in self._arguments:
            return False
        try:
            self._arguments[match.group(1)] = _literal(source[match.end() :])
        except ValueError:
            return False
        return True

    def _tell(self) -> None:
        arguments = json.dumps(self._arguments, ensure_ascii=False)
        if not is_unicode(arguments):  # lone surrogates, written as escapes: they can only stay escapes
            arguments = json.dumps(self._arguments)
        self._emitter.begin_call(self._name)
        self._emitter.arguments(arguments)
        self._held = []
        self._state = self._after_call

    def _after_call(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        if position == len(text):
            return position
        if text[position] == ",":
            self._held.append(",")
            self._state = self._before_name
        elif text[position] == "]":
            self._held = []
            self._state = self._text
        else:
            self._give_up()
            return position
        return position + 1

    def _string_opens(self, text: str, position: int) -> int:
        """One quote was seen: this tells `"x"` from `""` and from `\"\"\"x\"\"\"`."""
        if text[position] == self._quote:
            self._quotes_seen += 1
            self._argument.append(self._quote)
            if self._quotes_seen == 3:
                self._quote, self._quotes_seen = self._quote * 3, 0
                self._state = self._in_string
            return position + 1
        if self._quotes_seen == 2:
            self._state = self._in_arguments
        else:
            self._quotes_seen = 0
            self._state = self._in_string
        return position

    def _in_string(self, text: str, position: int) -> int:
        match = _IN_STRING[self._quote[0]].match(text, position)
        end = position if match is None else match.end()
        self._argument.append(text[position:end])
        if end > position:
            self._quotes_seen = 0
        if end == len(text):
            return end
        self._argument.append(text[end])
        if text[end] == "\\":
            self._quotes_seen = 0
            self._state = self._escaped
        else:
            self._quotes_seen += 1
            if self._quotes_seen == len(self._quote):
                self._state = self._in_arguments
        return end + 1

    def _escaped(self, text: str, position: int) -> int:
        self._argument.append(text[position])
        self._state = self._in_string
        return position + 1

    def _end(self) -> None:
        self._give_up()


def _literal(source: str) -> Any:
    """The value of a Python literal, as JSON knows it.

    Raises:
        ValueError: it is no literal, or JSON cannot say it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # models write "\d"
            tree = ast.parse(source.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("not an expression") from error
    return _value(tree.body)


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | bool() | int() | None):
            return node.value
        case ast.Constant(value=float()) if node.value not in (float("inf"), float("-inf")):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if not isinstance(
            value, bool
        ):
            return -_value(node.operand)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
    raise ValueError("not a literal of JSON")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("a key of JSON is a string")
