"""Typed reading of a checkpoint's `config.json`. A null counts as absent, as it does for transformers.

Every function raises `UnsupportedModelError` that names the field, what was found and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from models.errors import UnsupportedModelError

RawConfig = Mapping[str, Any]
"""A parsed `config.json` (or a part of it), Hugging Face's names."""


def refuse(key: str, value: object, allowed: str) -> NoReturn:
    """Raise the one error for a field that is out of range."""
    raise UnsupportedModelError(f"config.json: {key} is {value!r}; it must be {allowed}.")


def _required(key: str) -> NoReturn:
    raise UnsupportedModelError(f"config.json: {key} is missing, and it has no default.")


def optional_integer(raw: RawConfig, key: str, *, minimum: int = 1) -> int | None:
    """An integer of at least `minimum`, or None if the field is absent."""
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        refuse(key, value, f"an integer of at least {minimum}")
    return value


def integer(raw: RawConfig, key: str, default: int | None = None, *, minimum: int = 1) -> int:
    """An integer of at least `minimum`; without a default the field is required."""
    value = optional_integer(raw, key, minimum=minimum)
    if value is None and default is None:
        _required(key)
    return default if value is None else value  # type: ignore[return-value]


def optional_number(raw: RawConfig, key: str, *, open_minimum: float = 0.0) -> float | None:
    """A finite number above `open_minimum`, or None if the field is absent."""
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        refuse(key, value, "a finite number")
    if value <= open_minimum:
        refuse(key, value, f"a number above {open_minimum:g}")
    return float(value)


def number(raw: RawConfig, key: str, default: float | None = None) -> float:
    """A finite number above 0; without a default the field is required."""
    value = optional_number(raw, key)
    if value is None and default is None:
        _required(key)
    return default if value is None else value  # type: ignore[return-value]


def flag(raw: RawConfig, key: str, default: bool) -> bool:
    """true or false."""
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        refuse(key, value, "true or false")
    return value


def text(raw: RawConfig, key: str, default: str) -> str:
    """A string."""
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        refuse(key, value, "a string")
    return value


def integers(raw: RawConfig, key: str) -> tuple[int, ...] | None:
    """One integer or a list of them, none negative; None if the field is absent."""
    value = raw.get(key)
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in items):
        refuse(key, value, "an integer of at least 0, or a list of them")
    return tuple(items)


def strings(raw: RawConfig, key: str) -> tuple[str, ...] | None:
    """A list of strings; None if the field is absent."""
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        refuse(key, value, "a list of strings")
    return tuple(value)


def table(raw: RawConfig, key: str) -> RawConfig:
    """An object; empty if the field is absent."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse(key, value, "an object")
    return value
