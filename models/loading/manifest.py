"""`quire.json`: what a Quire checkpoint holds besides its arrays, so that it loads without the family that made it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from models.config import LayerConfig, ModelConfig, RopeConfig
from models.errors import ModelNotFoundError, WeightsError

MANIFEST_NAME = "quire.json"
_FORMAT, _VERSION = "quire-checkpoint", 1


@dataclass(frozen=True)
class Manifest:
    """The decoder and the dtype its parameters are stored in ("float32", "bfloat16", "float16")."""

    config: ModelConfig
    dtype: str


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `quire.json`."""
    content = {"format": _FORMAT, "version": _VERSION, "dtype": manifest.dtype, "config": asdict(manifest.config)}
    (directory / MANIFEST_NAME).write_text(json.dumps(content, indent=2) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and check `quire.json`.

    Raises:
        ModelNotFoundError: there is none.
        WeightsError: it is not JSON, of another version, or its fields are not those of `ModelConfig`.
    """
    file = directory / MANIFEST_NAME
    if not file.is_file():
        raise ModelNotFoundError(f"{directory} is not a Quire checkpoint: it has no {MANIFEST_NAME}.")
    try:
        content = json.loads(file.read_bytes())
        found = content["format"], content["version"]
        if found != (_FORMAT, _VERSION):
            raise WeightsError(
                f"{file} is {found[0]} version {found[1]}; this Quire reads {_FORMAT} version {_VERSION}."
            )
        return Manifest(config=parse_config(content["config"]), dtype=str(content["dtype"]))
    except WeightsError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{file} is corrupted: {type(error).__name__}: {error}.") from error


def parse_config(content: dict[str, Any]) -> ModelConfig:
    """The inverse of `asdict`; a field that is missing or unknown is an error, never a default."""
    return ModelConfig(
        **_exactly(ModelConfig, content)
        | {
            "rope": RopeConfig(**_exactly(RopeConfig, content["rope"])),
            "layers": tuple(LayerConfig(**_exactly(LayerConfig, layer)) for layer in content["layers"]),
            "eos_token_ids": tuple(content["eos_token_ids"]),
        }
    )


def _exactly(kind: type, content: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    if content.keys() != names:
        raise KeyError(f"{kind.__name__} differs in {', '.join(sorted(content.keys() ^ names))}")
    return content
