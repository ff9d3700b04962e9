"""Measures how well a model predicts a text, and how far it is from a reference: the facade of `quire eval`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import numpy as np

from engine.builder import fetch_options, load_weights
from engine.config import EngineConfig, Environment
from engine.errors import ConfigError, InvalidRequestError
from engine.evaluation import DEFAULT_WINDOW, Comparison, Evaluated, EvaluationReport
from engine.runtime.compile import COUNTER, enable_persistent_cache
from engine.runtime.progress import Report
from engine.text.tokenizer import Tokenizer
from models.loading.load import LoadedModel
from models.loading.resolver import resolve_model, resolve_tokenizer
from models.quantizer.evaluate import Predictions, Scores, cut_windows, predict, score
from pallas_kernels import native


def held_out_text() -> str:
    """The text that comes with Quire for this; no calibration sees it."""
    return resources.files("models.quantizer").joinpath("texts", "held_out.txt").read_text("utf-8")


def evaluate_model(
    config: EngineConfig,
    reference: EngineConfig | None = None,
    text: str | None = None,
    window: int = DEFAULT_WINDOW,
    progress: Report | None = None,
) -> EvaluationReport:
    """Measure the model of `config` on a text, window by window. The reference runs first and leaves memory before the
    model is loaded, except for its head.

    Args:
        config: which model, in which dtype, quantized how; of `kernels` all but attention applies.
        reference: another model with the same tokens, or the same one without quantization.
        text: None = `held_out_text()`.
        window: most tokens that are predicted from each other, BOS included where the tokenizer adds it.
        progress: called as weights are loaded and windows are done.

    Raises:
        ConfigError: a window out of range; a model and a reference that read the text as different tokens.
        InvalidRequestError: the text is shorter than two tokens.
        QuireError: of the kind that fits: model not found, unsupported, damaged.
    """
    if window < 8:
        raise ConfigError(f"window must be at least 8 tokens, got {window}.")
    chosen = held_out_text() if text is None else text
    report = progress or (lambda done, total, what: None)
    with COUNTER.building():  # what is compiled here is no shape that escaped a bucket
        base = None if reference is None else _run(reference, chosen, window, report)
        found = _run(config, chosen, window, report)
    if base is not None and not np.array_equal(found.windows, base.windows):
        raise ConfigError(
            f"{config.load.model} and {base.config.load.model} read the text as different tokens; "
            "a reference must have the same tokenizer."
        )
    with COUNTER.building():
        return _report(found, base, window)


@dataclass(frozen=True)
class _Run:
    """One model's predictions of a text's windows, int32[W, L]."""

    config: EngineConfig
    quantization: str | None
    dtype: str
    windows: np.ndarray
    predictions: Predictions


@dataclass(frozen=True)
class ReadText:
    """A model and a text in its tokens, int32[W, L]."""

    loaded: LoadedModel
    windows: np.ndarray


def read_model_and_text(
    config: EngineConfig, text: str, window: int, report: Report, most_tokens: int | None = None
) -> ReadText:
    """Load a model, and cut a text into windows of its tokens.

    Args:
        config: which model.
        text: a text.
        window: most tokens of a window, BOS included where the tokenizer adds it.
        report: called as weights are loaded.
        most_tokens: of the text; None = all.

    Raises:
        ConfigError: a window that is longer than the model allows, or a tokenizer of another model.
        InvalidRequestError: the text is shorter than two tokens.
        QuireError: of the kind that fits: model not found, unsupported, damaged.
    """
    environment = Environment.read()
    options = fetch_options(config.load, environment, report)
    files = resolve_model(config.load.model, options, config.load.revision)
    named = config.load.tokenizer
    tokenizer = Tokenizer.load(files.path if named is None else resolve_tokenizer(named, options))
    ids = tokenizer.encode(text, add_special_tokens=False)[:most_tokens]
    if len(ids) < 2:
        raise InvalidRequestError(f"The text is {len(ids)} tokens long; at least 2 are needed.")
    added = tokenizer.encode("", add_special_tokens=True)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id in added[:1] else None
    windows = cut_windows(ids, window, first)
    native.configure(environment.cache_dir / "native", config.kernels.cpu_compiler)
    enable_persistent_cache(config.compile, environment.cache_dir / "xla")
    loaded = load_weights(config.load, files.path, report)
    longest = loaded.config.max_position_embeddings
    if windows.shape[1] > longest:
        raise ConfigError(f"window={window} is longer than {config.load.model} allows: {longest} tokens.")
    if windows.max() >= loaded.config.vocab_size:
        raise ConfigError(f"The tokenizer knows tokens that {config.load.model} lacks; name its own with --tokenizer.")
    return ReadText(loaded, windows)


def _run(config: EngineConfig, text: str, window: int, report: Report) -> _Run:
    read = read_model_and_text(config, text, window, report)
    loaded, windows = read.loaded, read.windows
    predictions = predict(
        loaded.config,
        loaded.params,
        windows,
        matmul_implementation=config.kernels.matmul_implementation,
        progress=_windows_done(report),
    )
    return _Run(config, loaded.quantization, loaded.dtype, windows, predictions)


def _windows_done(report: Report) -> Callable[[int, int], None]:
    return lambda done, total: report(done, total, f"window {done} of {total}")


def _report(found: _Run, base: _Run | None, window: int) -> EvaluationReport:
    windows = found.windows
    try:
        scores = score(found.predictions, windows, None if base is None else base.predictions)
    except ValueError as error:
        raise ConfigError(f"{found.config.load.model} cannot be compared with the reference: {error}") from error
    comparison = None
    if base is not None and scores.mean_kl is not None and scores.agreement is not None:
        plain = score(base.predictions, windows)
        change, error = scores.change(plain)
        comparison = Comparison(_evaluated(base, plain), change, error, scores.mean_kl, scores.agreement)
    return EvaluationReport(_evaluated(found, scores), scores.num_tokens, len(windows), window, comparison)


def _evaluated(run: _Run, scores: Scores) -> Evaluated:
    return Evaluated(run.config.load.model, run.quantization, run.dtype, scores.perplexity)
