"""Markdown from results: who ran, what came out, how much better, how near to the machine's limits."""

from __future__ import annotations

from benchmarks.compare.audit import DISTURBED
from benchmarks.compare.results import (
    Lane,
    Measurement,
    Results,
    Summary,
    best_lane,
    gaps_ms,
    metrics_of,
    ratios,
    roofline_percent,
)
from benchmarks.markdown import table
from benchmarks.roofline import describe_ceilings
from benchmarks.workloads.cpu_smollm2 import STREAMS
from serving.timing import percentile

CUT_NOTE = (
    "**QUICK LOOK, NOT A MEASUREMENT: workloads were cut and repetitions are few (`--quick`). Do not quote these "
    "figures.**"
)


def markdown(results: Results, reference: str) -> str:
    """The whole report."""
    parts = [_heading(results), _engines(results)]
    parts += [_workload(results, name) for name in results.workloads if name not in STREAMS]
    parts += [_streams(results), _unsupported(results)]
    parts += [_ratio_table(results, reference), _ceilings(results), _failures(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def spread(summary: Summary | None, digits: int) -> str:
    """`48.4 (47.9–49.0)`; a dash if nothing was measured."""
    if summary is None:
        return "–"
    return f"{summary.median:.{digits}f} ({summary.low:.{digits}f}–{summary.high:.{digits}f})"


def _heading(results: Results) -> str:
    run = results.run
    machine = run.machine
    lines = [
        f"# Comparison of {run.date}, {run.dtype}",
        *([CUT_NOTE] if run.cut else []),
        f"{machine.get('processor', 'unknown processor')}, {machine.get('cpu_count', '?')} cores, "
        f"{machine.get('platform', '')}; commit {run.commit}. Median (lowest–highest) of {run.num_repetitions} "
        "repetitions; engines take turns within each; repetition 0 is warm-up and not counted. "
        f"Made with `{run.command}`.",
    ]
    return "\n\n".join(lines)


def _engines(results: Results) -> str:
    rows = []
    for name, facts in results.peers.items():
        versions = ", ".join(f"{package} {version}" for package, version in facts.versions.items())
        timed = [_start(results, name, is_cold) for is_cold in (True, False)] if results.starts else []
        rows.append([name, facts.about, versions, f"{facts.start_s:.1f}", *timed])
    timed_header = ("cold start s", "warm start s") if results.starts else ()
    header = ("engine", "what", "versions", "start s (caches as found)", *timed_header)
    note = (
        "From the start of the process to the first token. Cold: no compiled code in the engine's caches; warm: left "
        "there by the start before. Files of libraries and of the model are in the system's cache in both."
    )
    return "## Engines\n\n" + table(header, rows) + (f"\n\n{note}" if results.starts else "")


def _start(results: Results, name: str, is_cold: bool) -> str:
    starts = [start for start in results.starts if (start.peer, start.is_cold) == (name, is_cold)]
    failed = sum(start.error is not None for start in starts)
    disturbed = sum((start.foreign or 0.0) > DISTURBED for start in starts if start.error is None)
    notes = [f"**{failed} failed**"] * bool(failed) + [f"**{disturbed} disturbed**"] * bool(disturbed)
    return ", ".join([spread(Summary.of(start.seconds for start in starts), 1), *notes])


def _workload(results: Results, name: str) -> str:
    workload, metrics = results.workloads[name], metrics_of(name)
    header = ["engine", *(metric.name for metric in metrics), *_extra_header(name)]
    rows = []
    for lane in results.lanes(name):
        measured = results.counted(name, lane)
        figures = [spread(metric.summary(workload, measured), metric.digits) for metric in metrics]
        rows.append([str(lane), *figures, *_extra(results, name, lane, measured)])
    tokens = f"{workload.num_prompt_tokens:,} prompt tokens, {workload.num_output_tokens:,} output tokens"
    return f"## {name.upper()}: {workload.about} ({tokens})\n\n" + table(header, rows)


def _extra_header(name: str) -> list[str]:
    columns = {"w1": ["ITL p50 / p99 pooled ms", "% of roofline (bytes)"], "w4": ["cached prompt tokens"]}
    columns |= {"w2": ["% of roofline (FLOP)"], "w3": ["% of roofline (FLOP)"]}
    return [*columns[name], "same tokens as reference", "others' CPU", "n", "failed"]


def _extra(results: Results, name: str, lane: Lane, measured: list[Measurement]) -> list[str]:
    columns: list[str] = []
    if name == "w1":
        gaps = gaps_ms(measured)
        columns.append(f"{percentile(gaps, 50):.2f} / {percentile(gaps, 99):.2f}" if gaps else "–")
    if name == "w4":
        columns.append(spread(Summary.of(m.num_cached_tokens for m in measured), 0))
    else:
        percent = roofline_percent(results, name, lane)
        columns.append("–" if percent is None else f"{percent:.0f}")
    same = Summary.of(m.agreement for m in measured)
    columns.append("–" if same is None else f"{100 * same.median:.0f} %")
    return [*columns, _foreign(measured), str(len(measured)), str(results.failures(name, lane))]


def _foreign(measured: list[Measurement]) -> str:
    """`2 % (1–15), 1 disturbed`."""
    summary = Summary.of(m.foreign for m in measured)
    if summary is None:
        return "unknown"
    disturbed = sum((m.foreign or 0.0) > DISTURBED for m in measured)
    text = f"{100 * summary.median:.0f} % ({100 * summary.low:.0f}–{100 * summary.high:.0f})"
    return f"{text}, **{disturbed} disturbed**" if disturbed else text


def _streams(results: Results) -> str:
    """Output tokens per second by the number of streams, of the best way of each engine at each number."""
    names = [name for name in STREAMS if name in results.workloads]
    if not names:
        return ""
    rows = []
    for peer in results.peers:
        best = {name: best_lane(results, name, peer) for name in names}
        lanes = [(name, lane) for name in names for lane in results.lanes(name) if lane.peer == peer]
        if not lanes:
            continue
        cells = ["–" if lane is None else _rate(results, name, lane) for name, lane in best.items()]
        measured = [m for name, lane in lanes for m in results.counted(name, lane)]
        failed = sum(results.failures(name, lane) for name, lane in lanes)
        rows.append([peer, *cells, _foreign(measured), str(failed)])
    header = ("engine", *(str(STREAMS[name].num_requests) for name in names), "others' CPU", "failed")
    about = results.workloads[names[-1]].about.partition(", ")[2]
    title = f"## Output tok/s by number of streams: each {about}, all at once"
    return f"{title}\n\n" + table(header, rows)


def _rate(results: Results, name: str, lane: Lane) -> str:
    metric = metrics_of(name)[0]
    return spread(metric.summary(results.workloads[name], results.counted(name, lane)), metric.digits)


def _unsupported(results: Results) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, facts in results.peers.items():
        for workload, reason in facts.unsupported.items():
            reasons.setdefault((name, reason), []).append(workload.upper())
    lines = [f"- {name}, {', '.join(workloads)}: {reason}" for (name, reason), workloads in reasons.items()]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def _ratio_table(results: Results, reference: str) -> str:
    rows = []
    for name in results.workloads:
        if name in STREAMS:  # as many rows as all the others; the table of streams says it
            continue
        for ratio in ratios(results, name, reference):
            cells = [f"{ratio.of_medians:.2f}", spread(ratio.of_pairs, 2)]
            rows.append([name.upper(), ratio.metric.name, str(ratio.lane), *cells])
    if not rows:
        return ""
    header = ("workload", "figure", "against", "of medians", "per repetition")
    note = f"More than 1: {reference} is better. Against the variant of each peer that is best in the first figure."
    return f"## Ratios\n\n{note}\n\n" + table(header, rows)


def _ceilings(results: Results) -> str:
    lines = "\n".join(f"- {line}" for line in describe_ceilings(results.ceilings))
    note = (
        "Best of several tries before and after the measurements, a lower bound. Floors: W1 reads all weights and the "
        "context's keys and values for every token; W2 and W3 do 2 operations per weight and token, and attention. An "
        "engine with 8-bit weights must read fewer bytes; one that also multiplies 8-bit numbers is held to the better "
        "of the rates of int8 and of the run's dtype."
    )
    return f"## Ceilings of this machine\n\n{lines}\n\n{note}"


def _failures(results: Results) -> str:
    failed = [m for m in results.measurements if m.error is not None]
    lines = [f"- {m.workload}, repetition {m.repetition}, {m.lane}: {m.error}" for m in failed]
    return "## Failures\n\n" + ("\n".join(lines) if lines else "None.")
