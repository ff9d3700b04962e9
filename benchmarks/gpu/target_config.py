"""The description of a GPU that XLA compiles for: what the device says of itself against what the tree assumes of it.

Ahead-of-time compilation uses a description from a file; where it is wrong, what was checked without a GPU is not what
runs on one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[A-Za-z_][\w.]*|-?[\d.]+(?:[eE][+-]?\d+)?|[{}:<>]')


def fields(text: str) -> dict[str, str]:
    """The fields of a text-format protocol buffer by dotted path: `a { b: 1 }` becomes `{"a.b": "1"}`.

    Repeated fields get an index from the second on.
    """
    without_comments = re.sub(r"(?m)^\s*#.*$", "", text)
    found: dict[str, str] = {}
    for path, value in _walk(iter(_TOKEN.findall(without_comments)), ""):
        key, count = path, 1
        while key in found:
            count += 1
            key = f"{path}[{count}]"
        found[key] = value
    return found


def _walk(tokens: Iterator[str], prefix: str) -> Iterator[tuple[str, str]]:
    name = ""
    for token in tokens:
        match token:
            case "{" | "<":
                yield from _walk(tokens, f"{prefix}{name}.")
            case "}" | ">":
                return
            case ":":
                value = next(tokens)
                if value in ("{", "<"):
                    yield from _walk(tokens, f"{prefix}{name}.")
                else:
                    yield prefix + name, value
            case _:
                name = token


def differences(assumed: str, real: str) -> list[tuple[str, str, str]]:
    """(field, assumed value, real value) of every field that differs; "" where one side does not have it."""
    left, right = fields(assumed), fields(real)
    return [
        (name, left.get(name, ""), right.get(name, ""))
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]
