"""What a model reference means: the one place that turns `model="…"` into files on this machine."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from models.errors import ModelNotFoundError
from models.loading.fetch import TOKENIZER_PATTERNS, fetch_demo, fetch_snapshot
from models.loading.gguf_file import part_paths
from models.loading.source import Progress

DEMO = "demo"
_FORMS = (
    "a directory with config.json and *.safetensors (or one .gguf file, or a Quire checkpoint), a .gguf file, a hub id "
    f"org/name[@revision], or '{DEMO}' (SmolLM2-135M-Instruct)"
)
_HUB_ID = re.compile(r"^(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[^@\s]+))?$")
_GGUF_MAGIC = b"GGUF"


class ModelKind(StrEnum):
    """How a model lies on the disk."""

    DIRECTORY = "directory"
    GGUF = "gguf"
    ORBAX = "orbax"


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine.

    Attributes:
        kind: `directory` (config.json, safetensors), `gguf` (one file, or the first part of a split one), `orbax` (a
            checkpoint that Quire saved).
        path: the directory or file.
    """

    kind: ModelKind
    path: Path


@dataclass(frozen=True)
class FetchOptions:
    """Where and how models are fetched.

    Attributes:
        cache_dir: Quire's cache; the demo model is kept under it.
        download_dir: keeps hub snapshots and the demo model instead, if given; else snapshots go to Hugging Face's
            cache.
        offline: never download.
        hf_token: for private and gated repositories.
        progress: called with bytes done, bytes in total, and a name.
    """

    cache_dir: Path
    download_dir: Path | None = None
    offline: bool = False
    hf_token: str | None = None
    progress: Progress | None = None


def resolve_model(reference: str, options: FetchOptions, revision: str | None = None) -> ModelFiles:
    """Find a model, fetching it if need be.

    Args:
        reference: see `_FORMS`; what exists on this machine goes before the hub.
        options: where and how to fetch.
        revision: branch, tag or commit of a hub repository.

    Raises:
        ModelNotFoundError: it means nothing, or cannot be fetched.
        WeightsError: the demo model's download is not what it should be.
        CacheWriteError: the cache cannot be written.
    """
    if reference == DEMO:
        _refuse_revision(reference, revision)
        directory = options.download_dir or options.cache_dir / "models"
        return ModelFiles(ModelKind.GGUF, fetch_demo(directory, offline=options.offline, progress=options.progress))
    path = Path(reference).expanduser()
    if path.exists():
        _refuse_revision(reference, revision)
        return _local(path)
    match = _HUB_ID.match(reference)
    if match is None or path.suffix == ".gguf":
        raise _unknown(reference, path)
    snapshot = _snapshot(match, revision, options)
    if not (snapshot / "config.json").is_file():
        raise ModelNotFoundError(f"The hub repository {match['repository']} has no config.json.")
    if not any(snapshot.glob("*.safetensors")):
        raise ModelNotFoundError(
            f"The hub repository {match['repository']} has no *.safetensors; of a GGUF repository, download one file "
            "and name that."
        )
    return ModelFiles(ModelKind.DIRECTORY, snapshot)


def resolve_tokenizer(reference: str, options: FetchOptions, revision: str | None = None) -> Path:
    """Find a tokenizer of its own: a directory, a `.gguf` file, or a hub id (no weights are downloaded).

    Raises:
        ModelNotFoundError: it means nothing, or cannot be fetched.
        CacheWriteError: the cache cannot be written.
    """
    path = Path(reference).expanduser()
    if path.exists():
        _refuse_revision(reference, revision)
        if path.is_dir() or _is_gguf(path):
            return path
        raise ModelNotFoundError(f"{path} is neither a directory with tokenizer.json nor a GGUF file.")
    match = _HUB_ID.match(reference)
    if match is None or path.suffix == ".gguf":
        raise _unknown(reference, path)
    return _snapshot(match, revision, options, patterns=TOKENIZER_PATTERNS)


def resolve_config(reference: str, options: FetchOptions, revision: str | None = None) -> ModelFiles:
    """Find a model for its config alone: as `resolve_model`, but of a hub id no weights are downloaded.

    Raises:
        As `resolve_model`.
    """
    match = _HUB_ID.match(reference)
    if reference == DEMO or Path(reference).expanduser().exists() or match is None or reference.endswith(".gguf"):
        return resolve_model(reference, options, revision)
    snapshot = _snapshot(match, revision, options, patterns=TOKENIZER_PATTERNS)
    if not (snapshot / "config.json").is_file():
        raise ModelNotFoundError(f"The hub repository {match['repository']} has no config.json.")
    return ModelFiles(ModelKind.DIRECTORY, snapshot)


def _snapshot(
    match: re.Match[str], revision: str | None, options: FetchOptions, patterns: tuple[str, ...] | None = None
) -> Path:
    inline = match["revision"]
    if inline is not None and revision is not None and inline != revision:
        raise ModelNotFoundError(f"Two revisions are given, {inline!r} after the @ and {revision!r}; give one.")
    chosen = {} if patterns is None else {"patterns": patterns}
    return fetch_snapshot(
        match["repository"],
        inline or revision,
        options.download_dir,
        offline=options.offline,
        token=options.hf_token,
        progress=options.progress,
        **chosen,
    )


def _refuse_revision(reference: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelNotFoundError(f"{reference!r} has no revisions; revision={revision!r} is for hub ids (org/name).")


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error.strerror or error}.") from error


def _local(path: Path) -> ModelFiles:
    """What lies at an existing path."""
    if path.is_dir():
        return _local_directory(path)
    if path.suffix == ".gguf" or _is_gguf(path):
        return ModelFiles(ModelKind.GGUF, part_paths(path)[0])
    raise ModelNotFoundError(f"{path} is not a GGUF file; name the model's directory, or {_FORMS}.")


def _local_directory(path: Path) -> ModelFiles:
    if (path / "quire.json").is_file():
        return ModelFiles(ModelKind.ORBAX, path)
    # A split model is one model.
    ggufs = sorted({part_paths(file)[0] for file in path.glob("*.gguf")})
    has_config = (path / "config.json").is_file()
    if has_config and (not ggufs or any(path.glob("*.safetensors"))):
        return ModelFiles(ModelKind.DIRECTORY, path)
    if len(ggufs) == 1:
        return ModelFiles(ModelKind.GGUF, ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise ModelNotFoundError(f"{path} holds {len(ggufs)} GGUF models; name one: {names}.")
    raise ModelNotFoundError(f"{path} is no model: it has no config.json{_what_instead(path)}. A model is {_FORMS}.")


def _what_instead(path: Path) -> str:
    """The likely mistake behind a directory without config.json."""
    if (path / "adapter_config.json").is_file():
        return "; it is an adapter (LoRA), which needs its base model"
    inside = sorted(child.name for child in path.iterdir() if child.is_dir() and (child / "config.json").is_file())
    if inside:
        return f", but its subdirectory {inside[0]} has; name that"
    return "" if any(path.iterdir()) else " (it is empty)"


def _unknown(reference: str, path: Path) -> ModelNotFoundError:
    """The error for a reference that means nothing, with names nearby that it may have meant."""
    hint = ""
    if reference.lower() == DEMO:
        hint = f" Did you mean '{DEMO}'?"
    elif path.parent.is_dir():
        names = [child.name for child in path.parent.iterdir() if child.is_dir() or child.suffix == ".gguf"]
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
    return ModelNotFoundError(f"No model {reference!r}: there is no such file or directory.{hint} A model is {_FORMS}.")
