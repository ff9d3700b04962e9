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
QUANTIZER = HERE / "quantize_gguf.py"
GGUF_TYPES = {"bfloat16": "bf16", "float32": "f32"}


def model_for(form: ModelForm, reference: str, dtype: str, peer_python: Path) -> str:
    """What to tell a worker as its model.

    Args:
        reference: as Quire's `--model`; fetched if need be.
        dtype: of the run.
        peer_python: of the environment that converts a GGUF file.

    Raises:
        QuireError: the reference means nothing.
        PeerEnvironmentError: the conversion failed, or the model has no such form.
    """
    environment = Environment.read()
    options = FetchOptions(environment.cache_dir, offline=environment.offline, hf_token=environment.hf_token)
    files = resolve_model(reference, options)
    cache = environment.cache_dir / "benchmarks"
    if form is ModelForm.REFERENCE:
        return str(files.path)
    if form in (ModelForm.GGUF, ModelForm.GGUF_Q8_0):
        if files.kind is not ModelKind.GGUF:
            raise PeerEnvironmentError(f"{reference!r} is not a GGUF file, and llama.cpp reads no other; name one.")
        kind = "q8_0" if form is ModelForm.GGUF_Q8_0 else GGUF_TYPES[dtype]
        return str(_converted(files.path, cache, peer_python, QUANTIZER, f"{kind}.gguf", kind))
    if files.kind is ModelKind.DIRECTORY:
        return str(files.path)
    if files.kind is not ModelKind.GGUF:
        raise PeerEnvironmentError(f"{reference!r} is a Quire checkpoint, which peers cannot read; name its source.")
    return str(_converted(files.path, cache, peer_python, CONVERTER, "hf"))


def _converted(gguf: Path, cache: Path, python: Path, converter: Path, ending: str, *arguments: str) -> Path:
    """What a converter makes of a GGUF file; its name holds the hashes of the file and of the converter."""
    with gguf.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    version = hashlib.sha256(converter.read_bytes()).hexdigest()
    out = cache / f"{gguf.stem}-{content[:12]}-{version[:8]}-{ending}"
    if not out.exists():
        print(f"converting {gguf.name} to {out} (once)", file=sys.stderr)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [str(python), str(converter), str(gguf), str(out), *arguments]
        done = subprocess.run(command, env=clean_process_environment(), stdout=sys.stderr, check=False)
        if done.returncode:
            raise PeerEnvironmentError(f"{gguf} cannot be converted: `{' '.join(command)}` failed (see above).")
    return out
