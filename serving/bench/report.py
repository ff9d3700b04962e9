"""Describe what was measured on what, and write results as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.backend import EngineLike
from serving.bench.machine import machine
from serving.errors import UsageError

STDOUT = Path("-")


def result(
    settings: Mapping[str, Any], engine: EngineLike, startup_s: float, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """One benchmark's result: settings, machine, what the engine says of itself, and the measured values.

    Args:
        startup_s: the time from asking for the engine to having it, in seconds.
    """
    return {
        **measured,
        "startup_s": startup_s,
        "settings": dict(settings),
        "engine": dict(engine.describe()),
        "engine_metrics": dict(engine.metrics()),
        "machine": machine(),
    }


def write_json(value: Mapping[str, Any], out: Path) -> None:
    """Write a result to a file, whole or not at all; `-` prints it.

    Raises:
        UsageError: the file cannot be written.
    """
    text = json.dumps(value, indent=2, default=str)
    if out == STDOUT:
        print(text)
        return
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error}") from error


def show(title: str, rows: Mapping[str, str], *, to_stderr: bool) -> None:
    """Print a table of two columns under a title."""
    file = sys.stderr if to_stderr else sys.stdout
    width = max(len(name) for name in rows)
    print(f"\n{title}", *(f"  {name:<{width}}  {value}" for name, value in rows.items()), sep="\n", file=file)


def milliseconds(summary: Mapping[str, float]) -> str:
    """`mean 12.3 · p50 12.0 · p90 13.9 · p99 14.2 ms`; a dash if nothing was measured."""
    if not summary:
        return "-"
    keys = [key for key in summary if key == "mean" or key.startswith("p")]
    return " · ".join(f"{key} {summary[key] * 1e3:.1f}" for key in keys) + " ms"
