"""The model in the form that each peer wants, made once and kept in Quire's cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from benchmarks.compare.environments import HERE, PeerEnvironmentError, clean_process_environment
from benchmarks.compare.peer import ModelForm
from engine.config import Environment
from models.loading.resolver import FetchOptions, ModelKind, resolve_model

CONVERTER = HERE / "convert_gguf.py"


def model_for(form: ModelForm, reference: str, peer_python: Path) -> str:
    """What to tell a worker as its model.

    Args:
        reference: as Quire's `--model`; fetched if need be.
        peer_python: of the environment that converts a GGUF file to a Hugging Face directory.

    Raises:
        QuireError: the reference means nothing.
        PeerEnvironmentError: the conversion failed, or the model has no Hugging Face form.
    """
    environment = Environment.read()
    options = FetchOptions(environment.cache_dir, offline=environment.offline, hf_token=environment.hf_token)
    files = resolve_model(reference, options)
    if form is ModelForm.REFERENCE or files.kind is ModelKind.DIRECTORY:
        return str(files.path)
    if files.kind is not ModelKind.GGUF:
        raise PeerEnvironmentError(f"{reference!r} is a Quire checkpoint, which peers cannot read; name its source.")
    return str(_converted(files.path, environment.cache_dir / "benchmarks", peer_python))


def _converted(gguf: Path, cache: Path, python: Path) -> Path:
    """The Hugging Face directory of a GGUF file; its name holds the hashes of the file and of the converter."""
    with gguf.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    converter = hashlib.sha256(CONVERTER.read_bytes()).hexdigest()
    out = cache / f"{gguf.stem}-{content[:12]}-{converter[:8]}-hf"
    if not out.is_dir():
        print(f"converting {gguf.name} to {out} (once)", file=sys.stderr)
        command = [str(python), str(CONVERTER), str(gguf), str(out)]
        done = subprocess.run(command, env=clean_process_environment(), stdout=sys.stderr, check=False)
        if done.returncode:
            raise PeerEnvironmentError(f"{gguf} cannot be converted: `{' '.join(command)}` failed (see above).")
    return out
