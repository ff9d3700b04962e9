"""Part `step`: whole steps of the engine, back to back, against their floor."""

from __future__ import annotations

import gc
from collections.abc import Iterator

from benchmarks.gpu.models import model_names
from benchmarks.gpu.part import Case, Context, Part, Record, Records
from benchmarks.gpu.report import Table, limits_of, percent, step_floor_s
from benchmarks.gpu.steps import VARIANTS, StepBench, variant_config

BATCHES, CONTEXTS, PROMPTS = (1, 8, 32, 128, 256), (1024, 4096), (512, 2048, 8192, 32768)
SMOKE_BATCHES, SMOKE_CONTEXTS, SMOKE_PROMPTS = (2,), (40,), (20,)

_benches: dict[tuple[str, str], StepBench] = {}  # of this process; one at a time: a second cache would not fit


def bench_of(context: Context, model: str, variant: str) -> StepBench:
    """The bench of a model in a variant; the one before is freed.

    Raises:
        Skip: the engine does not know the variant.
    """
    if (model, variant) not in _benches:
        config = variant_config(context, model, variant)
        _benches.clear()
        gc.collect()
        _benches[model, variant] = StepBench(config, smoke=context.smoke)
    return _benches[model, variant]


def _cases(smoke: bool) -> list[Case]:
    cases = []
    batches, contexts, prompts = (
        (SMOKE_BATCHES, SMOKE_CONTEXTS, SMOKE_PROMPTS) if smoke else (BATCHES, CONTEXTS, PROMPTS)
    )
    for model in model_names(smoke):
        for variant in VARIANTS:
            for length in contexts:
                for batch in batches:
                    arguments = {"kind": "decode", "model": model, "variant": variant, "batch": batch, "tokens": length}
                    cases.append(Case(f"{model}, {variant}: decode {batch} x {length}", arguments, 150.0))
            for length in prompts:
                arguments = {"kind": "prefill", "model": model, "variant": variant, "batch": 1, "tokens": length}
                cases.append(Case(f"{model}, {variant}: prefill {length}", arguments, 150.0))
    return cases


def _run(case: Case, context: Context) -> Iterator[Record]:
    wanted = case.arguments
    bench = bench_of(context, wanted["model"], wanted["variant"])
    decodes = wanted["kind"] == "decode"
    try:
        measured = bench.decode(wanted["batch"], wanted["tokens"]) if decodes else bench.prefill(wanted["tokens"])
    except RuntimeError:
        _benches.clear()  # a step that failed took the state with it
        raise
    yield {**wanted, **measured.as_record(), **bench.about()}


def _report(records: Records) -> str:
    limits = limits_of(records)
    table = Table("model", "weights / KV", "step", "ms (min)", "floor ms", "% of floor", "tokens/s", "hand-over ms")
    for r in records["step"]:
        floor = step_floor_s(r, limits)
        what = f"decode {r['batch']} x {r['tokens']}" if r["kind"] == "decode" else f"prefill {r['tokens']}"
        tokens = r["batch"] if r["kind"] == "decode" else r["tokens"]
        table.add(
            r["model"],
            r["variant"],
            what,
            f"{r['us'] / 1e3:.3f} ({r['us_min'] / 1e3:.3f})",
            "–" if floor is None else f"{floor * 1e3:.3f}",
            percent(floor, r["us"] * 1e-6),
            f"{tokens / r['us'] * 1e6:,.0f}",
            f"{r['enqueue_us'] / 1e3:.3f}",
        )
    return table.markdown()


PART = Part(
    "step",
    "whole decode and prefill steps of the engine's executables",
    _cases,
    _run,
    _report,
    environment={"XLA_CLIENT_MEM_FRACTION": "0.95"},
)
