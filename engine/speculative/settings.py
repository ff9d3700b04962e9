"""`speculative_config`: a JSON object with vLLM's keys, checked whole before anything is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.scheduling.plan import MOST_DRAFTS

# method -> the keys that it alone has
KEYS_OF = {
    "ngram": ("prompt_lookup_min", "prompt_lookup_max"),
    "suffix": (
        "suffix_decoding_max_tree_depth",
        "suffix_decoding_max_cached_requests",
        "suffix_decoding_max_spec_factor",
        "suffix_decoding_min_token_prob",
    ),
    "layer_skip": ("layers", "quantization"),
    "draft_model": ("model", "quantization"),
    "medusa": ("model",),
    "eagle": ("model",),
    "eagle3": ("model",),
}
METHODS = tuple(KEYS_OF)
HEADS = ("medusa", "eagle", "eagle3")
ON_DEVICE = ("layer_skip", "draft_model", *HEADS)
WITH_MODEL = tuple(method for method, keys in KEYS_OF.items() if "model" in keys)
_ONE_OF = f"method must be one of {', '.join(METHODS)}"
MOST_DEPTH = 256
MOST_CACHED_REQUESTS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class SpeculativeSettings:
    """How to guess.

    Attributes:
        method: one of `METHODS`.
        num_speculative_tokens: most drafts of a sequence in a step.
        prompt_lookup_min, prompt_lookup_max: shortest and longest match of the last tokens ("ngram").
        suffix_decoding_max_tree_depth: tokens of a match beyond which it is not better ("suffix").
        suffix_decoding_max_cached_requests: outputs of the past that are kept to guess from; 0 = none ("suffix").
        suffix_decoding_max_spec_factor: most drafts for each token that matches ("suffix").
        suffix_decoding_min_token_prob: estimated probability below which a draft is not worth it ("suffix").
        layers: of the model that draft: their indices, or how many of the first; None = all, packed ("layer_skip").
        model: directory, file or hub id of the draft model ("draft_model"), directory or hub id of the heads (`HEADS`).
        quantization: of the draft model's weights while they are loaded ("draft_model"), or of the model's own weights,
            which then draft packed ("layer_skip").
        adaptive: draft only where it pays by the measured times and rates; False = wherever there is a guess.
    """

    method: str
    num_speculative_tokens: int
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5
    suffix_decoding_max_tree_depth: int = 24
    suffix_decoding_max_cached_requests: int = 10_000
    suffix_decoding_max_spec_factor: float = 1.0
    suffix_decoding_min_token_prob: float = 0.1
    layers: int | tuple[int, ...] | None = None
    model: str | None = None
    quantization: str | None = None
    adaptive: bool = True

    def __post_init__(self) -> None:
        _check(self.method != "mtp", f"no model family here has layers of multi-token prediction; {_ONE_OF}.")
        _check(self.method in METHODS, f"{_ONE_OF}, got {self.method!r}.")
        _check_integer("num_speculative_tokens", self.num_speculative_tokens, 1, MOST_DRAFTS)
        _check_integer("prompt_lookup_min", self.prompt_lookup_min, 1, MOST_DRAFTS)
        _check_integer("prompt_lookup_max", self.prompt_lookup_max, self.prompt_lookup_min, MOST_DRAFTS)
        _check_integer("suffix_decoding_max_tree_depth", self.suffix_decoding_max_tree_depth, 2, MOST_DEPTH)
        _check_integer(
            "suffix_decoding_max_cached_requests", self.suffix_decoding_max_cached_requests, 0, MOST_CACHED_REQUESTS
        )
        _check_number("suffix_decoding_max_spec_factor", self.suffix_decoding_max_spec_factor, 0.5, MOST_DRAFTS)
        _check_number("suffix_decoding_min_token_prob", self.suffix_decoding_min_token_prob, 0, 1)
        shortened = self.layers is not None or self.quantization is not None
        _check(shortened or self.method != "layer_skip", "layers or quantization is missing.")
        _check((self.model is not None) == (self.method in WITH_MODEL), "model is missing.")
        if self.layers is not None:
            object.__setattr__(self, "layers", _layers(self.layers))
        for name in ("model", "quantization"):
            value = getattr(self, name)
            _check(value is None or (isinstance(value, str) and value != ""), f"{name} must be a text, got {value!r}.")
        _check(isinstance(self.adaptive, bool), f"adaptive must be true or false, got {self.adaptive!r}.")


def parse_speculative(text: str) -> SpeculativeSettings:
    """The settings that a JSON object describes, or a file of one, named after `@`.

    Raises:
        ConfigError: it is no JSON object, a key is unknown or missing, or a value is out of range.
    """
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"speculative_config: {text[1:]} cannot be read: {error}.") from error
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
    if isinstance(found["method"], str) and found["method"] in KEYS_OF:
        for key in found:
            owners = [method for method, keys in KEYS_OF.items() if key in keys]
            own = not owners or found["method"] in owners
            _check(own, f"{key} is of method {' or '.join(map(repr, owners))} only.")
    return SpeculativeSettings(**{str(name): value for name, value in found.items()})


def _layers(value: Any) -> int | tuple[int, ...]:
    """Of "layers": a count, or ascending indices."""
    whole = [value] if isinstance(value, int) else value
    good = isinstance(whole, list | tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in whole)
    good = good and bool(whole) and whole[0] >= isinstance(value, int)
    good = good and all(low < high for low, high in pairwise(whole))
    _check(good, f"layers must be a number of layers or a list of ascending indices, got {value!r}.")
    return value if isinstance(value, int) else tuple(value)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"speculative_config: {message}")


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    _check(good, f"{name} must be an integer from {least} to {most}, got {value!r}.")


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    _check(good, f"{name} must be a number from {least} to {most}, got {value!r}.")
