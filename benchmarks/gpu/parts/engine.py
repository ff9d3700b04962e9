"""Part `engine`: the whole engine under load, and what of each step is the host's."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.models import model_config, model_names, write_model
from benchmarks.gpu.part import Case, Context, Part, Record, Records
from benchmarks.gpu.report import NOTHING, Table
from benchmarks.gpu.steps import engine_settings
from benchmarks.profiling.traffic import HOST_PARTS, Situation, empty, fill_decoding
from engine.built import BuiltEngine
from engine.engine import Engine
from engine.sampling_params import RequestOutputKind, SamplingParams
from serving.bench.measure import run_repetition
from serving.bench.workloads import LengthRange, Repetition, random_repetitions
from serving.timing import summarise

NUM_REQUESTS, LENGTHS, SEED = 256, LengthRange(100, 1024), 0
SMOKE_REQUESTS, SMOKE_LENGTHS = 3, LengthRange(5, 12)
REPETITIONS, SMOKE_REPETITIONS = 3, 1
STEADY, SMOKE_STEADY = ((1, 1024), (8, 1024), (32, 1024), (128, 1024), (256, 1024)), ((2, 16),)
STEADY_STEPS, SMOKE_STEADY_STEPS = 100, 4
VARIANT = "bf16 / bf16"  # whose back-to-back steps in `step` are the ones to compare with

_engines: dict[str, Engine] = {}  # of this process; one at a time


def _engine(context: Context, model: str) -> Engine:
    if model not in _engines:
        for engine in _engines.values():
            engine.shutdown()
        _engines.clear()
        gc.collect()
        settings = engine_settings(write_model(context.out / "models", model), smoke=context.smoke)
        _engines[model] = Engine(**settings)
    return _engines[model]


def _built(engine: Engine) -> BuiltEngine:
    """What the engine drives. Steps are timed from inside its loop, where users have no business."""
    return engine._parts


def _cases(smoke: bool) -> list[Case]:
    cases = []
    for model in model_names(smoke):
        cases.append(Case(f"{model}: build", {"model": model, "kind": "build"}, 420.0))
        cases.append(Case(f"{model}: generate", {"model": model, "kind": "generate"}, 240.0))
        cases.append(Case(f"{model}: token by token", {"model": model, "kind": "gaps"}, 120.0))
        cases += [
            Case(
                f"{model}: steady {batch} x {tokens}",
                {"model": model, "kind": "steady", "batch": batch, "tokens": tokens},
                90.0,
            )
            for batch, tokens in (SMOKE_STEADY if smoke else STEADY)
        ]
    return cases


def _workload(model: str, smoke: bool, num_repetitions: int) -> list[Repetition]:
    lengths = SMOKE_LENGTHS if smoke else LENGTHS
    requests = SMOKE_REQUESTS if smoke else NUM_REQUESTS
    vocab = model_config(model).vocab_size
    return random_repetitions(num_repetitions, requests, (lengths, lengths), vocab_size=vocab, seed=SEED)


def _run(case: Case, context: Context) -> Iterator[Record]:
    wanted = case.arguments
    engine = _engine(context, wanted["model"])
    match wanted["kind"]:
        case "build":
            yield {**wanted, **engine.describe()}
        case "generate":
            yield from ({**wanted, **record} for record in _generate(engine, wanted["model"], context.smoke))
        case "gaps":
            yield {**wanted, **_gaps(engine, wanted["model"], context.smoke)}
        case _:
            yield {**wanted, **_steady(_built(engine), wanted["batch"], wanted["tokens"], context.smoke)}


def _generate(engine: Engine, model: str, smoke: bool) -> Iterator[Record]:
    """Repetitions of the workload through `Engine.generate`; the first is the warm-up."""
    repetitions = _workload(model, smoke, 1 + (SMOKE_REPETITIONS if smoke else REPETITIONS))
    for index, repetition in enumerate(repetitions):
        engine.reset_prefix_cache()
        before = engine.metrics()
        measured = run_repetition(engine, repetition, detokenize=False)
        after = engine.metrics()
        if index == 0:
            continue
        yield {
            "repetition": index,
            "elapsed_s": measured.elapsed_s,
            "prompt_tokens": measured.num_prompt_tokens,
            "output_tokens": measured.num_output_tokens,
            "output_tokens_per_s": measured.num_output_tokens / measured.elapsed_s,
            "ttft_s": summarise([t.ttft_s for t in measured.timings if t.ttft_s is not None]),
            "tpot_s": summarise([t.tpot_s for t in measured.timings if t.tpot_s is not None]),
            "compiles_after_ready": after["compiles_after_ready"],
            **_host_per_step(before, after),
        }


def _host_per_step(before: dict[str, Any], after: dict[str, Any]) -> Record:
    steps = max(1, after["num_steps"] - before["num_steps"])
    host = {f"{part}_us": (after[f"{part}_s"] - before[f"{part}_s"]) / steps * 1e6 for part in HOST_PARTS}
    return {"num_steps": steps, **host}


def _gaps(engine: Engine, model: str, smoke: bool) -> Record:
    """The workload once more, token by token: every gap between two outputs of a request, all requests together."""
    built, repetition = _built(engine), _workload(model, smoke, 5)[-1]
    engine.reset_prefix_cache()
    last: dict[str, float] = {}
    first_s, gaps, started = [], [], time.perf_counter()
    for item in repetition:
        params = SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            max_tokens=item.output_len,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        built.core.add(built.inputs.make(item.prompt_token_ids, params))
    while built.core.has_work:
        outputs, now = built.core.step(), time.perf_counter()
        for output in outputs:
            if output.request_id in last:
                gaps.append(now - last[output.request_id])
            else:
                first_s.append(now - started)
            last[output.request_id] = now
    return {"elapsed_s": time.perf_counter() - started, "ttft_s": summarise(first_s), "itl_s": summarise(gaps)}


def _steady(built: BuiltEngine, batch: int, tokens: int, smoke: bool) -> Record:
    """Wall time and host time of decode steps of a full, unchanging batch."""
    num_steps = SMOKE_STEADY_STEPS if smoke else STEADY_STEPS
    situation = Situation(f"{batch} rows", batch, tokens)
    fill_decoding(built, situation, num_steps + 20)
    core, times = built.core, []
    for _ in range(2):
        core.step()
    before = dict(vars(core.stats))
    for _ in range(num_steps):
        started = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - started)
    after = dict(vars(core.stats))
    empty(built)
    return {"step_us": statistics.median(times) * 1e6, "step_us_min": min(times) * 1e6, **_host_per_step(before, after)}


def _report(records: Records) -> str:
    load = Table("model", "figure", "median", "per repetition")
    gaps = Table("model", "TTFT p50 / p99 ms", "ITL p50 / p90 / p99 / max ms")
    by_kind = {kind: [r for r in records["engine"] if r["kind"] == kind] for kind in ("generate", "gaps", "steady")}
    for model in dict.fromkeys(r["model"] for r in by_kind["generate"]):
        runs = [r for r in by_kind["generate"] if r["model"] == model]
        figures = {
            "output tokens/s": [r["output_tokens_per_s"] for r in runs],
            "TTFT p50 ms": [r["ttft_s"]["p50"] * 1e3 for r in runs],
            "TPOT p50 ms": [r["tpot_s"].get("p50", 0.0) * 1e3 for r in runs],
            "steps": [r["num_steps"] for r in runs],
            **{f"{part} µs per step": [r[f"{part}_us"] for r in runs] for part in HOST_PARTS},
            "compilations while serving": [r["compiles_after_ready"] for r in runs],
        }
        for name, values in figures.items():
            load.add(model, name, f"{statistics.median(values):,.1f}", ", ".join(f"{v:,.1f}" for v in values))
    for r in by_kind["gaps"]:
        ttft, itl = r["ttft_s"], r["itl_s"]
        ms = [f"{itl[key] * 1e3:.2f}" for key in ("p50", "p90", "p99", "max")] if itl else [NOTHING]
        gaps.add(r["model"], f"{ttft['p50'] * 1e3:.1f} / {ttft['p99'] * 1e3:.1f}", " / ".join(ms))
    return "\n\n".join((load.markdown(), gaps.markdown(), _steady_table(records, by_kind["steady"])))


def _steady_table(records: Records, steady: list[Record]) -> str:
    """Exposed host time: what a step of the engine takes beyond the same step back to back."""
    device = {
        (r["model"], r["batch"], r["tokens"]): r["us"]
        for r in records.get("step", ())
        if r["kind"] == "decode" and r["variant"] == VARIANT
    }
    table = Table(
        "model",
        "batch x context",
        "step µs (min)",
        "back to back µs",
        "exposed host µs",
        *(f"{p} µs" for p in HOST_PARTS),
    )
    for r in steady:
        alone = device.get((r["model"], r["batch"], r["tokens"]))
        table.add(
            r["model"],
            f"{r['batch']} x {r['tokens']}",
            f"{r['step_us']:.0f} ({r['step_us_min']:.0f})",
            None if alone is None else f"{alone:.0f}",
            None if alone is None else f"{r['step_us'] - alone:.0f}",
            *(f"{r[f'{part}_us']:.0f}" for part in HOST_PARTS),
        )
    return "Collect includes waiting for the device.\n\n" + table.markdown()


PART = Part(
    "engine",
    "256 requests at once, and steady decoding",
    _cases,
    _run,
    _report,
    environment={"XLA_CLIENT_MEM_FRACTION": "0.95"},
)
