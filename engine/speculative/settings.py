"""`speculative_config`: a JSON object with vLLM's keys, checked whole before anything is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import ConfigError
from engine.scheduling.plan import MOST_DRAFTS

METHODS = ("ngram",)


@dataclass(frozen=True, kw_only=True)
class SpeculativeSettings:
    """How to guess.

    Attributes:
        method: one of `METHODS`.
        num_speculative_tokens: most drafts of a sequence in a step.
        prompt_lookup_min, prompt_lookup_max: shortest and longest match of the last tokens ("ngram").
        adaptive: draft only where it pays by the measured times and rates; False = wherever there is a guess.
    """

    method: str
    num_speculative_tokens: int
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5
    adaptive: bool = True

    def __post_init__(self) -> None:
        _check(self.method in METHODS, f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        _check_integer("num_speculative_tokens", self.num_speculative_tokens, 1, MOST_DRAFTS)
        _check_integer("prompt_lookup_min", self.prompt_lookup_min, 1, MOST_DRAFTS)
        _check_integer("prompt_lookup_max", self.prompt_lookup_max, self.prompt_lookup_min, MOST_DRAFTS)
        _check(isinstance(self.adaptive, bool), f"adaptive must be true or false, got {self.adaptive!r}.")


def parse_speculative(text: str) -> SpeculativeSettings:
    """The settings that a JSON object describes.

    Raises:
        ConfigError: it is no JSON object, a key is unknown or missing, or a value is out of range.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"speculative_config is not valid JSON: {error}.") from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"speculative_config must be a JSON object, got {text}.")
    known = [field.name for field in fields(SpeculativeSettings)]
    unknown = sorted(set(found) - set(known))
    _check(not unknown, f"{', '.join(unknown)} is not known; known are {', '.join(known)}.")
    for name in ("method", "num_speculative_tokens"):
        _check(name in found, f"{name} is missing.")
    return SpeculativeSettings(**{str(name): value for name, value in found.items()})


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"speculative_config: {message}")


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    _check(good, f"{name} must be an integer from {least} to {most}, got {value!r}.")
