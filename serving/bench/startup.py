"""`quire bench startup`: from a process's start to its first token, stage by stage, with empty and with full caches.

Each run is a process of its own. A cold one finds empty caches, in a directory that is removed afterwards; the model
itself is there. A warm one finds what an earlier run, of this command or another, has left in the user's caches.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, Environment, worker_environment
from engine.startup import MODULE
from serving.bench import report
from serving.bench.flags import count
from serving.bench.machine import machine
from serving.errors import EXIT_OK, MeasurementError, UsageError
from serving.flags import add_engine_flags, engine_settings

SUMMARY = "measure how long a start takes, to the first token"
CACHES = ("warm", "cold", "both")
COLD, WARM = "cold", "warm"
DEMO = "demo"

# Runs a child: (settings, its cache directory or None for the user's) -> what it reports.
RunChild = Callable[[Mapping[str, Any], Path | None], dict[str, Any]]


def set_up(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS] [MODEL]"
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as --model")
    parser.add_argument("--runs", type=count, default=3, metavar="N", help="starts of each kind (default: 3)")
    parser.add_argument(
        "--caches",
        choices=CACHES,
        default="both",
        help="with which caches: as they are, empty, or both (default: both)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file; '-' = stdout")
    add_engine_flags(parser)
    parser.set_defaults(run=functools.partial(run, run_child=run_child))


def run(args: argparse.Namespace, run_child: RunChild) -> int:
    """Measure and report.

    Raises:
        UsageError: two models are named.
        MeasurementError: a start failed, or two of them gave different tokens.
    """
    settings = engine_settings(args)
    if args.model is not None:
        if settings.get("model", args.model) != args.model:
            raise UsageError(f"MODEL is {args.model} and --model is {settings['model']}: give one of them.")
        settings["model"] = args.model
    settings = {"compile_in_background": True, **settings, "show_progress": False}
    config = EngineConfig.from_flat(**settings)  # a wrong flag is answered at once
    kinds = [kind for kind in (COLD, WARM) if args.caches in (kind, "both")]
    runs = {kind: [_one(run_child, config, settings, kind) for _ in range(args.runs)] for kind in kinds}
    tokens = {tuple(each["token_ids"]) for reports in runs.values() for each in reports}
    if len(tokens) != 1:
        raise MeasurementError(f"the starts gave different first tokens: {sorted(tokens)}")
    result = {"runs": runs, "medians": {kind: medians(runs[kind]) for kind in kinds}}
    result |= {"settings": settings, "machine": machine()}
    _show(result, args.runs, to_stderr=args.json == report.STDOUT)
    if args.json is not None:
        report.write_json(result, args.json)
    return EXIT_OK


def _one(run_child: RunChild, config: EngineConfig, settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if kind == WARM:
        return run_child(settings, None)
    if config.load.model == DEMO and config.load.download_dir is None:
        # It lies in the cache that is to be empty; what is measured is not a download.
        settings = {**settings, "download_dir": str(Environment.read().cache_dir / "models")}
    with tempfile.TemporaryDirectory(prefix="quire-cold-") as empty:
        return run_child({**settings, "compilation_cache_dir": str(Path(empty) / "xla")}, Path(empty))


def run_child(settings: Mapping[str, Any], cache: Path | None) -> dict[str, Any]:
    """Start a process that starts an engine.

    Raises:
        MeasurementError: it failed; says how.
    """
    environment = worker_environment()
    if cache is not None:
        environment["QUIRE_CACHE"] = str(cache)
    spawned = time.monotonic()
    command = [sys.executable, "-c", MODULE, repr(spawned), json.dumps(dict(settings))]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode != 0:
        raise MeasurementError(f"a start failed with status {child.returncode}: {child.stderr.strip()[-800:]}")
    answer = json.loads(child.stdout.splitlines()[-1])
    return {**answer, "process_s": time.monotonic() - spawned}


def medians(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of each stage, of the time to the first token, and of the whole process, in seconds."""
    stages = {name: statistics.median(each["stages"][name] for each in reports) for name in reports[0]["stages"]}
    whole = {name: statistics.median(each[name] for each in reports) for name in ("first_token_s", "process_s")}
    return stages | whole


def _show(result: Mapping[str, Any], num_runs: int, *, to_stderr: bool) -> None:
    found: Mapping[str, Mapping[str, float]] = result["medians"]
    kinds = list(found)
    names = list(dict.fromkeys(name for kind in kinds for name in found[kind]))
    rows = {"": "".join(f"{kind:>10}" for kind in kinds)}
    for name in names:
        label = {"first_token_s": "to the first token", "process_s": "whole process"}.get(name, name)
        rows[label] = "".join(f"{found[kind][name]:>8.2f} s" if name in found[kind] else f"{'-':>10}" for kind in kinds)
    report.show(f"start-up, medians of {num_runs}", rows, to_stderr=to_stderr)
