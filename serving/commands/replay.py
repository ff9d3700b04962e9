"""`quire replay`: do again what an engine with `--record` did, and name the first difference."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

from engine.replay.report import ReplayReport
from serving.backend import RecordingPlayer
from serving.errors import EXIT_FAILED, EXIT_OK
from serving.flags import add_engine_flags, engine_settings

SUMMARY = "do again what an engine with --record did, and name the first difference"

USED_FLAGS = (
    "model", "dtype", "attention_implementation", "matmul_implementation", "cpu_compiler", "pin_cpu_threads",
    "compilation_cache_dir", "compile_threads", "show_progress",
)  # fmt: skip


def set_up(parser: argparse.ArgumentParser, play: RecordingPlayer) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS] FILE"
    parser.add_argument("recording", type=Path, metavar="FILE", help="what --record wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    add_engine_flags(parser, only=USED_FLAGS)
    parser.set_defaults(run=functools.partial(run, play=play))


def run(args: argparse.Namespace, play: RecordingPlayer) -> int:
    """Replay, then print. `EXIT_FAILED` if something came out otherwise."""
    report = play(args.recording, engine_settings(args))
    print(json.dumps(dataclasses.asdict(report), indent=2) if args.json else text(report))
    return EXIT_OK if report.difference is None else EXIT_FAILED


def text(report: ReplayReport) -> str:
    """The report for people."""
    lines = [f"{report.num_steps} steps, {report.num_tokens} tokens, {report.seconds:.2f} s on {report.device}"]
    if report.device != report.recorded_on:
        lines[0] += f" (recorded on {report.recorded_on})"
    if report.difference is None:
        lines.append("all came out as recorded, bit for bit")
        return "\n".join(lines)
    found = report.difference
    lines.append(f"first difference in step {found.step}: {found.what}" + (f" of {found.where}" if found.where else ""))
    lines += [f"  now:  {found.found}", f"  then: {found.recorded}"]
    return "\n".join(lines)
