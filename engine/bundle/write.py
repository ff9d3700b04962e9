"""Makes a bundle: starts an engine as ever, and writes down what it came to."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import jax

from engine.builder import build_engine
from engine.built import BuiltEngine
from engine.bundle.files import digest_of, pack_executable, write_arrays
from engine.bundle.key import current_key
from engine.bundle.manifest import (
    BUNDLE_NAME,
    EXECUTABLES_NAME,
    TOKENIZER_NAME,
    TREES_NAME,
    WEIGHTS_NAME,
    ArrayEntry,
    Manifest,
    is_bundle,
    write_manifest,
)
from engine.bundle.probe import ask, probe_prompt
from engine.config import EngineConfig
from engine.errors import BundleError
from engine.runtime.progress import Report
from engine.text.tokenizer import Tokenizer
from pallas_kernels import native

logger = logging.getLogger("quire")


def compile_bundle(config: EngineConfig, out: Path, progress: Report) -> None:
    """Compile every executable of the model of `config` and write a bundle to `out`.

    Args:
        out: a directory that does not exist yet.
        progress: called after each executable.

    Raises:
        BundleError: the model is a bundle, a drafter would have to come along, or `out` cannot be written.
        QuireError: as `build_engine`.
    """
    if is_bundle(Path(config.load.model).expanduser()):
        raise BundleError(f"{config.load.model} is a bundle: compile the model that it was made from.")
    if config.speculative.settings is not None:
        raise BundleError("a bundle holds no drafter: leave speculative_config out, or serve the model itself with it.")
    # Everything has to be there, and the largest executable has to have been asked for its memory. No cache: on a CPU
    # an executable that was read from one cannot be written again (it comes back without some of its functions).
    config = replace(config, compile=replace(config.compile, compile_in_background=False, compilation_cache_dir=""))
    built = build_engine(config)
    try:
        out.mkdir(parents=True)
        out.chmod(0o700)
        _write(built, out, progress)
    except OSError as error:
        raise BundleError(f"{out} cannot be written: {error}.") from error
    finally:
        built.close()


def _write(built: BuiltEngine, out: Path, progress: Report) -> None:
    parts = built.parts
    executables = _write_executables(built, out, progress)
    entries, tree = write_arrays(out / WEIGHTS_NAME, parts.params)
    (out / TREES_NAME).write_bytes(tree)
    if parts.tokenizer_path is not None:
        (out / TOKENIZER_NAME).mkdir()
        (parts.tokenizer or Tokenizer.load(parts.tokenizer_path)).save(out / TOKENIZER_NAME)
    manifest = _manifest(built, executables, entries)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    digests = {str(path.relative_to(out)): digest_of(path) for path in files}
    for path in files:
        path.chmod(0o600)
    write_manifest(out, replace(manifest, digests=digests))
    (out / BUNDLE_NAME).chmod(0o600)


def _write_executables(built: BuiltEngine, out: Path, progress: Report) -> dict[str, str]:
    (out / EXECUTABLES_NAME).mkdir()
    made, files = built.parts.executables.by_name(), dict[str, str]()
    for index, (name, compiled) in enumerate(made.items()):
        files[name] = f"{EXECUTABLES_NAME}/{index}.bin"
        (out / files[name]).write_bytes(pack_executable(compiled))
        progress(index + 1, len(made), name)
    return files


def _manifest(built: BuiltEngine, executables: dict[str, str], arrays: list[ArrayEntry]) -> Manifest:
    parts = built.parts
    return Manifest(
        key=current_key(),
        settings=built.config.flat(),
        model=parts.model,
        limits=parts.program.limits,
        ledger=parts.ledger,
        quantization=parts.quantization,
        implementations=parts.implementations,
        generation=parts.generation,
        has_tokenizer=parts.tokenizer_path is not None,
        uses_native=jax.devices()[0].platform == "cpu" and native.unavailable() is None,
        executables=executables,
        arrays=arrays,
        digests={},
        probe=ask(built, probe_prompt(built)),
    )
