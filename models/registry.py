"""Which family serves which architecture. A new family is one file in `families/` and one entry here."""

from __future__ import annotations

from collections.abc import Sequence

from models.errors import UnsupportedModelError
from models.families.common import Family
from models.families.llama import LLAMA
from models.families.mistral import MISTRAL
from models.families.qwen2 import QWEN2
from models.families.qwen3 import QWEN3
from models.families.smollm3 import SMOLLM3

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3)

_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}
_BY_GGUF_ARCHITECTURE = {name: family for family in FAMILIES for name in family.gguf_architectures}


def supported_architectures() -> tuple[str, ...]:
    """Every value of `architectures` in a `config.json` that Quire can serve."""
    return tuple(_BY_ARCHITECTURE)


def supported_gguf_architectures() -> tuple[str, ...]:
    """Every value of a GGUF file's `general.architecture` that Quire can serve."""
    return tuple(_BY_GGUF_ARCHITECTURE)


def resolve_family(architectures: Sequence[str]) -> Family:
    """The family of a config's `architectures` (the first entry that is supported).

    Raises:
        UnsupportedModelError: none is; the message lists those that are.
    """
    for name in architectures:
        if name in _BY_ARCHITECTURE:
            return _BY_ARCHITECTURE[name]
    given = f"architecture {', '.join(architectures)} is not supported" if architectures else "no architecture is named"
    raise UnsupportedModelError(f"config.json: {given}; supported are {', '.join(_BY_ARCHITECTURE)}.")


def resolve_gguf_family(architecture: str) -> Family:
    """The family of a GGUF file's `general.architecture`.

    Raises:
        UnsupportedModelError: it is not supported; the message lists those that are.
    """
    if architecture not in _BY_GGUF_ARCHITECTURE:
        supported = ", ".join(_BY_GGUF_ARCHITECTURE)
        raise UnsupportedModelError(f"GGUF architecture {architecture!r} is not supported; supported are {supported}.")
    return _BY_GGUF_ARCHITECTURE[architecture]
