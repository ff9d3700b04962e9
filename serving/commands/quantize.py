"""`quire quantize`: write a quantized checkpoint that Quire, transformers and vLLM load."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

from engine.config import EngineConfig
from engine.quantizing import BITS, FORMATS, METHODS, QuantizationReport, Settings
from engine.runtime.progress import progress_bar
from serving.backend import ModelQuantizer
from serving.commands import evaluate
from serving.commands.quantize_plot import plot_errors
from serving.errors import EXIT_OK, UsageError
from serving.flags import add_engine_flags, engine_settings

SUMMARY = "write a quantized checkpoint of a model"
USED_FLAGS = ("tokenizer", "revision", "download_dir", "compilation_cache_dir", "show_progress")
REPORT_NAME, PLOT_NAME = "quantization_report.json", "quantization_errors.png"
_DEFAULTS = Settings()


def set_up(parser: argparse.ArgumentParser, quantize: ModelQuantizer) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS] MODEL -o OUT"
    parser.add_argument("model", metavar="MODEL", help="model directory, .gguf file, hub id, or 'demo'")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="folder to write")
    parser.add_argument("--method", choices=METHODS, default=_DEFAULTS.method, help="how integers are chosen")
    parser.add_argument("--bits", type=int, choices=BITS, default=_DEFAULTS.bits, help="of a number")
    parser.add_argument(
        "--group-size", type=int, default=_DEFAULTS.group_size, metavar="N", help="inputs that share a scale; -1 = all"
    )
    signs = parser.add_mutually_exclusive_group()
    signs.add_argument("--sym", action="store_true", default=True, help="no zero points (default)")
    signs.add_argument("--asym", dest="sym", action="store_false", help="zero points")
    parser.add_argument("--format", choices=FORMATS, default=_DEFAULTS.format, help="of the checkpoint")
    parser.add_argument("--act-order", action="store_true", help="columns in the order of their weight (gptq)")
    parser.add_argument("--awq-scales", action="store_true", help="AWQ's scales first (autoround)")
    parser.add_argument("--damp", type=float, default=_DEFAULTS.damp, help="of Hessians, relative (gptq)")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help=".txt, or .jsonl with a field text; default: Quire's own text"
    )
    for name, about in (
        ("num_samples", "calibration sequences, at most"),
        ("seq_len", "tokens of each, at most"),
        ("steps", "of the descent (autoround)"),
        ("batch_size", "sequences of a step (autoround)"),
        ("seed", "of what is random (autoround)"),
    ):
        default = getattr(_DEFAULTS, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{about} (default: {default})")
    parser.add_argument("--no-evaluation", action="store_true", help="do not measure the result on the held-out text")
    add_engine_flags(parser, only=USED_FLAGS)
    parser.set_defaults(run=functools.partial(run, quantize=quantize))


def run(args: argparse.Namespace, quantize: ModelQuantizer) -> int:
    """Quantize, then print and keep the report."""
    config = EngineConfig.from_flat(model=args.model, **engine_settings(args))
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    text = None if args.calibration is None else read_calibration(args.calibration)
    out: Path = args.out.absolute()
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is no folder to write {out.name} into.")
    with progress_bar(f"quantizing {args.model}", show=config.compile.show_progress) as progress:
        report = quantize(config, out, settings, text, not args.no_evaluation, progress)
    (out / REPORT_NAME).write_text(json.dumps(dataclasses.asdict(report), indent=1), encoding="utf-8")
    print(table(report))
    print(plot_errors(report.layers, out / PLOT_NAME))
    print(f"{out}: {report.size_bytes / 1e6:.1f} MB")
    return EXIT_OK


def table(report: QuantizationReport) -> str:
    """The report for people: errors of outputs, relative, in percent."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for layer in report.layers for name in layer.errors))
    lines = [f"error of outputs in %, on {report.num_tokens} tokens", ""]
    lines.append("layer" + "".join(f"{kind:>11}" for kind in kinds) + f"{'all so far':>12}")
    for layer in report.layers:
        by_kind = {name.rpartition(".")[2]: error for name, error in layer.errors.items()}
        cells = "".join(f"{100 * by_kind[kind]:>11.2f}" if kind in by_kind else f"{'':>11}" for kind in kinds)
        lines.append(f"{layer.layer:>5}{cells}{100 * layer.block:>12.2f}")
    if report.evaluation is not None:
        lines += ["", evaluate.table(report.evaluation)]
    return "\n".join(lines)


def read_calibration(path: Path) -> str:
    """Text of a .txt file, or the fields `text` of a .jsonl file, a blank line between each.

    Raises:
        UsageError: it cannot be read, or a line is not what it must be.
    """
    whole = evaluate.read_text(path)
    if path.suffix != ".jsonl":
        return whole
    texts = []
    for number, line in enumerate(whole.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise UsageError(f"--calibration {path}, line {number}: not JSON: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            raise UsageError(f'--calibration {path}, line {number}: must be an object with a string "text"')
        texts.append(found["text"])
    return "\n\n".join(texts)
