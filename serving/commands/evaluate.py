"""`quire eval`: how well a model predicts a text, and how far its predictions are from a reference's."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

from engine.config import EngineConfig
from engine.evaluation import DEFAULT_WINDOW, Evaluated, EvaluationReport
from engine.runtime.progress import progress_bar
from serving.backend import ModelEvaluator
from serving.errors import EXIT_OK, UsageError
from serving.flags import add_engine_flags, engine_settings

SUMMARY = "measure how well a model predicts a text"

USED_FLAGS = (
    "tokenizer", "dtype", "quantization", "load_format", "revision", "download_dir", "seed", "matmul_implementation",
    "compilation_cache_dir", "show_progress",
)  # fmt: skip
OF_THE_MODEL = ("quantization", "matmul_implementation", "load_format", "revision", "tokenizer")


def set_up(parser: argparse.ArgumentParser, evaluate: ModelEvaluator) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS] MODEL"
    parser.add_argument("model", metavar="MODEL", help="model directory, .gguf file, hub id, or 'demo'")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="compare with this model, in full precision as it lies there; default: with --quantization, MODEL without "
        "it, otherwise none",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text; default: one that comes with Quire")
    parser.add_argument(
        "--window",
        type=int,
        default=DEFAULT_WINDOW,
        metavar="N",
        help=f"most tokens that are predicted from each other (default: {DEFAULT_WINDOW})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_engine_flags(parser, only=USED_FLAGS)
    parser.set_defaults(run=functools.partial(run, evaluate=evaluate))


def run(args: argparse.Namespace, evaluate: ModelEvaluator) -> int:
    """Measure, then print."""
    settings = engine_settings(args)
    config = EngineConfig.from_flat(model=args.model, **settings)
    text = None if args.text is None else read_text(args.text)
    with progress_bar(f"measuring {args.model}", show=config.compile.show_progress) as progress:
        report = evaluate(config, reference_of(args.model, args.reference, settings), text, args.window, progress)
    print(json.dumps(dataclasses.asdict(report), indent=2) if args.json else table(report))
    return EXIT_OK


def reference_of(model: str, named: str | None, settings: dict[str, object]) -> EngineConfig | None:
    """What to compare with: the named model, else a quantized model without its quantization, else nothing.

    Args:
        model: what is measured.
        named: the argument of `--reference`.
        settings: of the model.
    """
    if named is not None:
        shared = {name: value for name, value in settings.items() if name not in OF_THE_MODEL}
        return EngineConfig.from_flat(model=named, **shared)
    if settings.get("quantization") is None:
        return None
    plain = {k: v for k, v in settings.items() if k not in ("quantization", "matmul_implementation")}
    return EngineConfig.from_flat(model=model, **plain)


def table(report: EvaluationReport) -> str:
    """The report for people."""
    lines = [f"{report.num_tokens} tokens in {report.num_windows} windows of at most {report.window}", ""]
    lines.append(_row("", "perplexity", "change", "KL (nats)", "same top token"))
    compared = report.comparison
    if compared is None:
        lines.append(_row(_name(report.model), f"{report.model.perplexity:.3f}", "", "", ""))
        return "\n".join(lines)
    change = f"{100 * compared.perplexity_change:+.2f} % ± {100 * compared.standard_error:.2f}"
    figures = (f"{report.model.perplexity:.3f}", change, f"{compared.mean_kl:.5f}", f"{100 * compared.agreement:.1f} %")
    lines.append(_row(_name(compared.reference), f"{compared.reference.perplexity:.3f}", "", "", ""))
    lines.append(_row(_name(report.model), *figures))
    return "\n".join(lines)


def _name(model: Evaluated) -> str:
    short = model.model if len(model.model) <= 32 else f"…{model.model[-31:]}"
    return (
        f"{short}, {'unquantized' if model.quantization is None else model.quantization.split(' ')[0]}, {model.dtype}"
    )


def _row(name: str, *cells: str) -> str:
    widths = (10, 16, 10, 15)
    return f"{name:<58}" + "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"--text {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path} is not UTF-8 text: {error}") from error
