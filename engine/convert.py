"""Writes any model that the engine can load as a checkpoint of fused, ready-to-serve weights."""

from __future__ import annotations

from pathlib import Path

import jax

from engine.builder import fetch_options
from engine.config import EngineConfig, Environment
from engine.errors import ConfigError, UnsupportedModelError
from engine.runtime.progress import Report
from engine.text.tokenizer import Tokenizer
from models.loading.load import load_model
from models.loading.orbax import save_checkpoint
from models.loading.resolver import ModelKind, resolve_model


def convert_model(config: EngineConfig, out: Path, progress: Report) -> None:
    """Load the model of `config` and write it, with its tokenizer, to `out`.

    Args:
        config: which model, in which dtype.
        out: a directory that does not exist yet.
        progress: called as weights are loaded.

    Raises:
        ConfigError: a quantization is set.
        UnsupportedModelError: the checkpoint is quantized, and its matrices stay packed.
        QuireError: of the kind that fits: model not found, unsupported, damaged; `out` exists or cannot be written.
    """
    if config.load.quantization is not None:
        raise ConfigError(
            f"A converted checkpoint holds full-precision weights: quantization={config.load.quantization!r} is for "
            "loading it. Leave it out here, and name it where the checkpoint is served."
        )
    files = resolve_model(
        config.load.model, fetch_options(config.load, Environment.read(), progress), config.load.revision
    )
    loaded = load_model(files.path, config.load.load_format, config.load.dtype, config.load.seed, progress)
    if not all(isinstance(weight, jax.Array) for weight in loaded.params.values()):
        raise UnsupportedModelError(
            f"A converted checkpoint holds full-precision weights, and those of {config.load.model} are quantized: "
            f"{loaded.quantization}. Serve it as it is."
        )
    originals = files.path if files.path.is_dir() else None
    save_checkpoint(loaded.params, loaded.config, out, originals)
    if files.kind is ModelKind.GGUF:
        Tokenizer.load(files.path).save(out)  # a GGUF file keeps its tokenizer inside
