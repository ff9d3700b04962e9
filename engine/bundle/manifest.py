"""`bundle.json`: what a bundle holds, and what it was made for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import BundleError
from engine.runtime.limits import RuntimeLimits
from engine.runtime.memory import MemoryLedger
from models.config import ModelConfig
from models.loading.manifest import parse_config

BUNDLE_NAME = "bundle.json"
EXECUTABLES_NAME, WEIGHTS_NAME, TREES_NAME, TOKENIZER_NAME = "executables", "weights.bin", "trees.bin", "tokenizer"
FORMAT, VERSION = "quire-bundle", 1


@dataclass(frozen=True)
class Probe:
    """A prompt and what the model said to it, greedily.

    Attributes:
        prompt_token_ids, token_ids: of the prompt, and of the answer.
        logprobs: of the answer's tokens.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class ArrayEntry:
    """One array of `weights.bin`: where it lies, in bytes, and what it is."""

    offset: int
    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle is.

    Attributes:
        key: what its executables depend on, name -> value (`engine.bundle.key`).
        settings: of the engine that it was made from (`EngineConfig.flat`).
        model: the decoder.
        limits, ledger: sizes, and where the memory goes.
        quantization: in words; None if nothing is packed.
        implementations: operation -> what runs it.
        generation: the model's generation_config.json.
        has_tokenizer, uses_native: whether there is a tokenizer; whether native kernels were there.
        executables: name of the job -> file.
        arrays: leaves of the parameters, in order.
        digests: file, relative to the bundle -> sha256.
        probe: to be asked at every start.
    """

    key: dict[str, str]
    settings: dict[str, Any]
    model: ModelConfig
    limits: RuntimeLimits
    ledger: MemoryLedger
    quantization: str | None
    implementations: dict[str, str]
    generation: dict[str, Any]
    has_tokenizer: bool
    uses_native: bool
    executables: dict[str, str]
    arrays: list[ArrayEntry]
    digests: dict[str, str]
    probe: Probe


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `bundle.json`."""
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    (directory / BUNDLE_NAME).write_text(json.dumps(content, indent=1) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read `bundle.json`.

    Raises:
        BundleError: it cannot be read, is of another version, or lacks something.
    """
    file = directory / BUNDLE_NAME
    try:
        content = json.loads(file.read_bytes())
        found = content.pop("format"), content.pop("version")
        if found != (FORMAT, VERSION):
            raise BundleError(f"{file} is {found[0]} version {found[1]}; this Quire reads {FORMAT} version {VERSION}.")
        parsed = {
            "model": parse_config(content["model"]),
            "limits": RuntimeLimits(**content["limits"]),
            "ledger": MemoryLedger(**content["ledger"]),
            "arrays": [ArrayEntry(**entry) for entry in content["arrays"]],
            "probe": Probe(**content["probe"]),
        }
        return Manifest(**content | parsed)
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{file} is damaged: {type(error).__name__}: {error}.") from error


def is_bundle(path: Path) -> bool:
    """True if `quire compile` made this directory."""
    return (path / BUNDLE_NAME).is_file()
