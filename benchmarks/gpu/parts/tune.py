"""Part `tune`: the kernels' own tuner, on every operation that has something to tune."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.gpu.part import Case, Context, Part, Record, Records, Skip
from benchmarks.gpu.report import Table
from pallas_kernels import device
from pallas_kernels.registry import OPS

TUNER = "pallas_kernels.tune"
LONGEST_REASON = 300


def _cases(smoke: bool) -> list[Case]:
    del smoke
    cases = []
    for op in OPS:
        # Case by case: what was tuned when the time is over is in the table.
        names = [case.name for case in op.gpu_cases() if case.in_table] or [None]
        cases += [Case(f"{op.name}: {n or 'all'}", {"op": op.name, "input": n}, 300.0) for n in names]
    return cases


def _run(case: Case, context: Context) -> Iterator[Record]:
    op, name = case.arguments["op"], case.arguments["input"]
    if importlib.util.find_spec(TUNER) is None:
        raise Skip(f"not built yet: there is no {TUNER}")
    if name is None:
        raise Skip(f"{op} has no GPU kernel, so there is nothing to tune")
    here = device.current_device()
    short = next((short for short, known in device.KNOWN.items() if known.kind == here.kind), None)
    if short is None:
        raise Skip(f"the tuner does not know {here.kind}; it knows {', '.join(device.KNOWN)}")
    folder = context.out / "tuned"
    command = [sys.executable, "-m", TUNER, op, "--device", short, "--case", name, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="\n")
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr.strip()[-LONGEST_REASON:]}")
    table = folder / here.slug / f"{op}.json"
    entries = json.loads(table.read_text(encoding="utf-8"))["entries"] if table.is_file() else {}
    yield {**case.arguments, "table": str(table.relative_to(context.out)), "entries": entries}


def _report(records: Records) -> str:
    table = Table("op", "key", "configuration", "µs", "xla µs")
    entries = {(r["op"], key): entry for r in records["tune"] for key, entry in r["entries"].items()}
    for (op, key), entry in entries.items():
        table.add(op, key, json.dumps(entry["config"]), entry["us"], entry.get("xla_us"))
    return table.markdown()


PART = Part(
    "tune",
    "the best tiles of each kernel, in `tuned/`",
    _cases,
    _run,
    _report,
    environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
)
