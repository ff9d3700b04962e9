"""Writes a quantized checkpoint of a model: the facade of `quire quantize`."""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path

import numpy as np

from engine.builder import fetch_options
from engine.config import EngineConfig, Environment
from engine.errors import InvalidRequestError
from engine.evaluate import evaluate_model
from engine.quantizing import QuantizationReport, Settings
from engine.runtime.compile import COUNTER, enable_persistent_cache
from engine.runtime.progress import Report
from engine.text.tokenizer import Tokenizer
from models.loading.resolver import ModelKind, resolve_model, resolve_tokenizer
from models.quantizer.evaluate import cut_windows
from models.quantizer.job import quantize_model
from models.quantizer.types import SettingsError


def calibration_text() -> str:
    """The text that comes with Quire for this."""
    return resources.files("models.quantizer").joinpath("texts", "calibration.txt").read_text("utf-8")


def quantize(
    config: EngineConfig,
    out: Path,
    settings: Settings,
    text: str | None = None,
    *,
    evaluate: bool = True,
    progress: Report | None = None,
) -> QuantizationReport:
    """Quantize the model of `config` and write it, with its tokenizer, to `out`.

    Args:
        config: which model.
        out: a directory that does not exist; what an interrupted call left beside it is gone on with.
        settings: how.
        text: to calibrate with; None = `calibration_text()`.
        evaluate: whether to measure the result beside the original.
        progress: called as layers are done.

    Raises:
        SettingsError: the settings do not fit the model, or an unfinished job is another one.
        InvalidRequestError: the text is too short.
        QuireError: of the kind that fits: model not found, unsupported, damaged; `out` exists.
    """
    report = progress or (lambda done, total, what: None)
    environment = Environment.read()
    options = fetch_options(config.load, environment, report)
    files = resolve_model(config.load.model, options, config.load.revision)
    if files.kind is ModelKind.ORBAX:
        raise SettingsError(
            f"{config.load.model} is a converted checkpoint, whose matrices are fused: quantize the model it came from."
        )
    named = config.load.tokenizer
    tokenizer = Tokenizer.load(files.path if named is None else resolve_tokenizer(named, options))
    windows = _windows(tokenizer, calibration_text() if text is None else text, settings)
    enable_persistent_cache(config.compile, environment.cache_dir / "xla")
    with COUNTER.building():  # what is compiled here is no shape that escaped a bucket
        layers = quantize_model(files.path, out, settings, windows, report)
    if files.kind is ModelKind.GGUF or named is not None:
        tokenizer.save(out)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    evaluation = None
    if evaluate:
        made = dataclasses.replace(config.load, model=str(out), quantization=None, load_format="auto", revision=None)
        evaluation = evaluate_model(dataclasses.replace(config, load=made), config, None, progress=report)
    return QuantizationReport(layers, windows.size, size, evaluation)


def _windows(tokenizer: Tokenizer, text: str, settings: Settings) -> np.ndarray:
    """int32[S, L]: at most `num_samples` of at most `seq_len` tokens."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < 16:
        raise InvalidRequestError(f"The calibration text is {len(ids)} tokens long; at least 16 are needed.")
    return cut_windows(ids, settings.seq_len)[: settings.num_samples]
