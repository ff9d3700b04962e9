"""Frozen dataclasses as plain values and back: requests, sampling parameters, what an engine says of itself.

Fields that have their default value are left out: a request has some thirty of them and most users set three. On the
way back a class is made as always, so that it checks itself, and a list becomes a tuple where its field is one.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints


def to_plain(value: Any) -> Any:
    """Dataclasses become dicts, enums their values, tuples stay sequences."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(content)
            for field in fields(value)
            if not _is_default(field.default, content := getattr(value, field.name))
        }
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: to_plain(content) for key, content in value.items()}
    return value


def _is_default(default: Any, content: Any) -> bool:
    # Not by equality alone: 1 equals True and 1.0.
    return default is not MISSING and type(default) is type(content) and default == content


def from_plain[T](kind: type[T], plain: Mapping[str, Any]) -> T:
    """An instance of a dataclass.

    Raises:
        Whatever the class raises if it checks itself.
    """
    hints = _hints(kind)
    return kind(**{name: _restore(hints[name], value) for name, value in plain.items()})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _restore(hint: Any, value: Any) -> Any:
    """A plain value as its field wants it: dataclass, enum or tuple, by the arms of the field's type."""
    for arm in get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        if isinstance(arm, type) and is_dataclass(arm) and isinstance(value, dict):
            return from_plain(arm, value)
        if isinstance(arm, type) and issubclass(arm, enum.Enum) and value is not None:
            return arm(value)
        if get_origin(arm) is tuple and isinstance(value, list):
            inner = get_args(arm)[0]
            return tuple(value) if inner in (int, str) else tuple(_restore(inner, item) for item in value)
    return value
