"""Part `graphs`: what command buffers (CUDA graphs) are worth, and which way of updating them is best."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.models import model_names
from benchmarks.gpu.part import Case, Context, Part, Record, Records
from benchmarks.gpu.parts.step import bench_of
from benchmarks.gpu.report import Table, limits_of, percent, step_floor_s

UPDATE_MODE = "--xla_gpu_command_buffer_update_mode="
MODES = {
    "default": "",
    "ALWAYS_UPDATE": f"{UPDATE_MODE}ALWAYS_UPDATE",
    "SKIP_TEMP": f"{UPDATE_MODE}SKIP_TEMP",
    "SKIP_PROFILED": f"{UPDATE_MODE}SKIP_PROFILED",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
}
SMOKE_MODES = ("SKIP_TEMP",)
BATCHES, SMOKE_BATCHES = (1, 32), (2,)
CONTEXT, SMOKE_CONTEXT = 1024, 40
VARIANT = "bf16 / bf16"


def _cases(smoke: bool) -> list[Case]:
    # XLA reads its flags once, and ends the process at a value it does not know: a process for each mode.
    return [
        Case(
            f"{model}, {mode}",
            {"model": model, "mode": mode},
            timeout_s=150.0,
            own_process=True,
            environment={"XLA_FLAGS": flag} if flag else {},
        )
        for model in model_names(smoke)[::-1]
        for mode, flag in MODES.items()
        if not smoke or mode in SMOKE_MODES
    ]


def _run(case: Case, context: Context) -> Iterator[Record]:
    bench = bench_of(context, case.arguments["model"], VARIANT)
    tokens = SMOKE_CONTEXT if context.smoke else CONTEXT
    for batch in SMOKE_BATCHES if context.smoke else BATCHES:
        step = {"kind": "decode", "variant": VARIANT, "batch": batch, "tokens": tokens}
        yield {**case.arguments, **step, **bench.decode(batch, tokens).as_record()}


def _report(records: Records) -> str:
    limits = limits_of(records)
    table = Table("model", "mode", "batch x context", "ms (min)", "% of floor", "hand-over ms", "first call s")
    for r in records["graphs"]:
        table.add(
            r["model"],
            r["mode"],
            f"{r['batch']} x {r['tokens']}",
            f"{r['us'] / 1e3:.3f} ({r['us_min'] / 1e3:.3f})",
            percent(step_floor_s(r, limits), r["us"] * 1e-6),
            f"{r['enqueue_us'] / 1e3:.3f}",
            f"{r['first_s']:.2f}",
        )
    return table.markdown()


PART = Part(
    "graphs",
    "a decode step under the ways of updating command buffers, and without them",
    _cases,
    _run,
    _report,
    environment={"XLA_CLIENT_MEM_FRACTION": "0.95"},
)
