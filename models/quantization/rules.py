"""Which bits and groups each module has, where a config says more than one thing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from models.errors import UnsupportedModelError
from models.families.fields import RawConfig, refuse
from models.quantization import bitstream

PLAIN_BITS = 16  # and more: not quantized


@dataclass(frozen=True)
class Rule:
    """How one module is stored.

    Attributes:
        bits: of a number.
        group_size: inputs that share a scale; -1 = all.
    """

    bits: int
    group_size: int

    def num_groups(self, num_inputs: int) -> int:
        """Of a matrix with so many inputs; the last may be short."""
        return 1 if self.group_size < 0 else -(-num_inputs // self.group_size)


class Rules(Protocol):
    """What a config says of modules that are quantized."""

    def of(self, module: str) -> Rule:
        """How a module is stored that is quantized."""
        ...


@dataclass(frozen=True)
class PatternRules:
    """Of GPTQ: the first pattern that a module's name begins with decides.

    Attributes:
        default: of modules that no pattern matches.
        overrides: pattern -> rule.
    """

    default: Rule
    overrides: Sequence[tuple[re.Pattern[str], Rule]] = ()

    def of(self, module: str) -> Rule:
        """See `Rules`."""
        return next((rule for pattern, rule in self.overrides if pattern.match(module)), self.default)


@dataclass(frozen=True)
class NamedRules:
    """Of AutoRound: a module's own name goes first, then names that it ends with, then patterns found in it.

    Attributes:
        default: of modules that nothing names.
        named: name or pattern -> rule.
    """

    default: Rule
    named: Mapping[str, Rule] = field(default_factory=dict)

    def of(self, module: str) -> Rule:
        """See `Rules`."""
        if module in self.named:
            return self.named[module]
        for name, rule in self.named.items():
            if module.endswith(f".{name}"):
                return rule
        for name, rule in self.named.items():
            if re.search(r"[*+?^$()\[\]{}|\\]", name) and re.search(name, module):
                return rule
        return self.default


def parse_bits(raw: RawConfig, default: int | None = None, key: str = "bits") -> int:
    """Bits of a number.

    Raises:
        UnsupportedModelError: none of 2 to 8.
    """
    bits = raw.get(key, default)
    if isinstance(bits, bool) or bits not in bitstream.BITS:
        refuse(f"quantization_config.{key}", bits, "an integer from 2 to 8")
    return bits


def parse_group_size(raw: RawConfig, default: int | None = None, key: str = "group_size") -> int:
    """Inputs that share a scale; -1 = all.

    Raises:
        UnsupportedModelError: neither -1 nor positive.
    """
    size = raw.get(key, default)
    if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and size < 1):
        refuse(f"quantization_config.{key}", size, "-1 or a positive integer")
    return size


def parse_pattern(pattern: str, key: str) -> re.Pattern[str]:
    """A regular expression of a config.

    Raises:
        UnsupportedModelError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UnsupportedModelError(f"config.json: {key} has the invalid pattern {pattern!r}: {error}.") from error
