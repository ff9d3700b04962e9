"""`quire distill-draft`: find the layers with which a model can draft for itself."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

from engine.config import EngineConfig
from engine.distilling import DistillReport
from engine.runtime.progress import progress_bar
from serving.backend import DraftDistiller
from serving.commands.evaluate import read_text
from serving.errors import EXIT_OK, UsageError
from serving.flags import add_engine_flags, engine_settings

SUMMARY = "find the layers with which a model can draft for itself (speculative decoding without another model)"
DEFAULT_TOKENS = 512

USED_FLAGS = (
    "tokenizer", "dtype", "quantization", "load_format", "revision", "download_dir", "seed", "show_progress",
)  # fmt: skip


def set_up(parser: argparse.ArgumentParser, distill: DraftDistiller) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS] MODEL -o FILE"
    parser.add_argument("model", metavar="MODEL", help="model directory, .gguf file, hub id, or 'demo'")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help="JSON file for --speculative-config @FILE"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to measure on; default: Quire's own")
    parser.add_argument(
        "--tokens", type=int, default=DEFAULT_TOKENS, metavar="N", help=f"of the text (default: {DEFAULT_TOKENS})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_engine_flags(parser, only=USED_FLAGS)
    parser.set_defaults(run=functools.partial(run, distill=distill))


def run(args: argparse.Namespace, distill: DraftDistiller) -> int:
    """Measure, write the settings, print what was found.

    Raises:
        UsageError: the file cannot be written.
    """
    config = EngineConfig.from_flat(model=args.model, **engine_settings(args))
    text = None if args.text is None else read_text(args.text)
    with progress_bar(f"shortening {args.model}", show=config.compile.show_progress) as progress:
        report = distill(config, text, args.tokens, progress)
    best = report.best
    settings = {
        "method": "layer_skip",
        "layers": list(best.layers),
        "num_speculative_tokens": best.num_drafts,
    }
    try:
        args.out.write_text(json.dumps(settings) + "\n")
    except OSError as error:
        raise UsageError(f"--out {args.out} cannot be written: {error.strerror}.") from error
    print(json.dumps(dataclasses.asdict(report), indent=2) if args.json else table(report, args.out))
    return EXIT_OK


def table(report: DistillReport, out: Path) -> str:
    """The report for people."""
    lines = [f"{report.model}: {report.num_layers} layers, {report.num_tokens} tokens of text", ""]
    lines.append("layers  same next token  cost of a pass  drafts  predicted speedup")
    for choice in report.choices:
        mark = "  <- written" if choice is report.best else ""
        lines.append(
            f"{len(choice.layers):>6}  {100 * choice.agreement:>13.1f} %  {choice.cost:>14.2f}"
            f"  {choice.num_drafts:>6}  {choice.speedup:>17.2f}{mark}"
        )
    lines.append("")
    if report.best.speedup <= 1.0:
        lines.append(
            "No choice is predicted to pay for this model: with it the engine will draft only where it measures a gain."
        )
    lines.append(f"Use it with --speculative-config @{out}")
    return "\n".join(lines)
