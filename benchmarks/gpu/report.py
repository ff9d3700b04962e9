"""Markdown from result files. Percentages are made here, with the ceilings that the same session measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.costs import ModelCosts
from benchmarks.gpu.models import model_config
from benchmarks.gpu.part import Part, Record
from benchmarks.gpu.records import DONE, Ended
from benchmarks.gpu.roofline import Limits, Precision, decode_s, prefill_s
from benchmarks.markdown import table

NOTHING = "–"
SMOKE_NOTE = "**SMOKE RUN: tiny shapes, to see that the code runs. These figures mean nothing.**"
# Variant of a step -> what it stores; the names of `steps.VARIANTS`.
PRECISIONS: Mapping[str, Precision] = {
    "bf16 / bf16": Precision(),
    "bf16 / fp8": Precision("bf16", "fp8"),
    "fp8 / fp8": Precision("fp8", "fp8"),
    "int4 / bf16": Precision("int4"),
}


class Table:
    """A Markdown table that grows row by row."""

    def __init__(self, *header: str) -> None:
        self._header, self._rows = header, []

    def add(self, *cells: Any) -> None:
        """One more row; None becomes a dash."""
        self._rows.append([NOTHING if cell is None else str(cell).replace("|", "\\|") for cell in cells])

    def markdown(self) -> str:
        """The table, or that there is nothing in it."""
        return table(self._header, self._rows) if self._rows else "No results."


def percent(floor_s: float | None, measured_s: float) -> str:
    """`floor / measured` as a percentage; a dash without a floor."""
    return NOTHING if floor_s is None else f"{100 * floor_s / measured_s:.1f}"


def limits_of(records: Mapping[str, Sequence[Record]]) -> Limits | None:
    """The device's ceilings as `environment` measured them, the best method of each; None if it did not.

    Rates that could not be measured are taken to be those of bfloat16, twice for 8-bit numbers, as the hardware has it.
    """
    bandwidths, flops = [], {}
    for record in records.get("environment", ()):
        if "bytes_per_s" in record:
            bandwidths.append(record["bytes_per_s"])
        if "flops_per_s" in record:
            flops[record["dtype"]] = max(record["flops_per_s"], flops.get(record["dtype"], 0.0))
    if not bandwidths or "bf16" not in flops:
        return None
    return Limits(max(bandwidths), {"fp8": 2 * flops["bf16"], "int8": 2 * flops["bf16"], **flops})


def step_floor_s(record: Record, limits: Limits | None) -> float | None:
    """The floor of a result of `step` or `graphs`; None without ceilings."""
    if limits is None:
        return None
    costs, precision = ModelCosts.of(model_config(record["model"]), "bfloat16"), PRECISIONS[record["variant"]]
    if record["kind"] == "decode":
        return decode_s(costs, limits, record["batch"], record["tokens"], precision)
    return prefill_s(costs, limits, record["tokens"], precision)


def cases_table(ended: Mapping[str, Ended], num_cases: int) -> str:
    """How the cases of a part went: numbers, and the reason of each that was not done."""
    counts: dict[str, int] = {}
    for end in ended.values():
        counts[end.status] = counts.get(end.status, 0) + 1
    left = num_cases - len(ended)
    parts = [f"{count} {status}" for status, count in counts.items()] + ([f"{left} not run"] if left else [])
    lines = [f"{num_cases} cases: {', '.join(parts) or 'none'}."]
    by_reason: dict[tuple[str, str], list[str]] = {}
    for end in ended.values():
        if end.status != DONE:
            by_reason.setdefault((end.status, end.reason), []).append(end.case)
    for (status, reason), cases in by_reason.items():
        names = "; ".join(cases[:3]) + (f"; and {len(cases) - 3} more" if len(cases) > 3 else "")
        lines.append(f"- {status}: {names}: {reason}")
    return "\n".join(lines)


def markdown(
    about: Mapping[str, Any],
    parts: Sequence[Part],
    records: Mapping[str, Sequence[Record]],
    ended: Mapping[str, Mapping[str, Ended]],
) -> str:
    """The whole report.

    Args:
        about: date, commit, device …, as `gpu_session` writes it.
        parts: those to report on.
        records: results of every part, for ceilings and comparisons.
        ended: part -> case -> how it ended.
    """
    texts = [f"# GPU session of {about['date']}: {about['device']}"]
    if about["smoke"]:
        texts.append(SMOKE_NOTE)
    texts.append("; ".join(f"{name} {value}" for name, value in about.items() if name not in ("date", "smoke")) + ".")
    for part in parts:
        if not ended[part.name]:
            continue
        num_cases = len(part.cases(about["smoke"]))
        texts += [f"## {part.name}: {part.about}", part.report(records), cases_table(ended[part.name], num_cases)]
    return "\n\n".join(texts) + "\n"
