"""Part `start`: from the start of a process to its first token, with an empty compilation cache and with a full one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.models import model_names, write_model
from benchmarks.gpu.part import Case, Context, Part, Record, Records
from benchmarks.gpu.report import Table
from benchmarks.gpu.steps import engine_settings

STAGES = ("interpreter", "import", "device", "resolve", "load", "compile", "first_token")


def _cases(smoke: bool) -> list[Case]:
    # The small model first: if time runs out, one is done. The worker itself never touches the device.
    return [Case(model, {"model": model}, 420.0) for model in model_names(smoke)[::-1]]


def _run(case: Case, context: Context) -> Iterator[Record]:
    model = case.arguments["model"]
    settings = engine_settings(write_model(context.out / "models", model), smoke=context.smoke)
    if context.smoke:  # with the caches as they are: a cold start compiles for half a minute
        yield {"model": model, "caches": "as found", **_start(settings)}
        return
    with tempfile.TemporaryDirectory() as cache:
        for caches in ("cold", "warm", "warm again"):
            yield {"model": model, "caches": caches, **_start({**settings, "compilation_cache_dir": cache})}
            if not any(Path(cache).iterdir()):
                raise RuntimeError("nothing was written to the compilation cache: the next start would not be warm")


def _start(settings: dict) -> Record:
    command = [sys.executable, "-m", "benchmarks.gpu.first_token", str(time.time()), json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _report(records: Records) -> str:
    header = [f"{stage.replace('_', ' ')} s" for stage in STAGES]
    table = Table("model", "caches", "total s", *header, "executables", "trace / lower / backend s, all threads")
    for r in records["start"]:
        threads = r["over_all_threads"]
        table.add(
            r["model"],
            r["caches"],
            f"{r['total_s']:.2f}",
            *(f"{r[f'{stage}_s']:.2f}" for stage in STAGES),
            r["num_executables"],
            " / ".join(f"{threads.get(name, 0.0):.1f}" for name in ("trace_s", "lower_s", "backend_s")),
        )
    return table.markdown()


PART = Part(
    "start",
    "process start to first token, cold and warm",
    _cases,
    _run,
    _report,
    environment={"XLA_CLIENT_MEM_FRACTION": "0.95"},
)
