"""What a soak found: verdict, Markdown, JSON and a plot of memory over time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.soak.traffic import Outcome
from benchmarks.soak.watch import Sample, grows, growth

RESULTS = ("result", "error", "busy", "left", "wrong", "lost")


@dataclass(frozen=True)
class Soak:
    """One soak.

    Attributes:
        outcomes: of every request that was sent.
        samples: taken while the load ran, oldest first; at least four.
        after: a sample taken once the load was over and the server had had time to settle.
        exit_code: of the server after SIGTERM.
        facts: machine, versions, command, date.
    """

    outcomes: Sequence[Outcome]
    samples: Sequence[Sample]
    after: Sample
    exit_code: int | None
    facts: dict[str, Any]

    def faults(self) -> list[str]:
        """What is not as it must be; empty if all is well."""
        found = [f"{o.kind}: {o.result}: {o.detail}" for o in self.outcomes if o.result in ("wrong", "lost")]
        for name in ("running", "waiting", "kv_usage", "compiles"):
            if self.after.values[name] != 0:
                found.append(f"after the load {name} is {self.after.values[name]:g}, not 0")
        if grows(self.samples):
            before, last = growth(self.samples)
            found.append(f"memory grows: {before:.0f} MiB in the second quarter, {last:.0f} MiB in the last")
        if self.exit_code != 0:
            found.append(f"the server ended with exit code {self.exit_code} on SIGTERM")
        return found


def markdown(soak: Soak) -> str:
    """The report."""
    counts = Counter((o.kind, o.result) for o in soak.outcomes)
    rows = [[kind, *(str(counts[kind, result]) for result in RESULTS)] for kind in sorted({k for k, _ in counts})]
    rows.append(["all", *(str(sum(o.result == result for o in soak.outcomes)) for result in RESULTS)])
    before, last = growth(soak.samples)
    faults = soak.faults()
    lines = [
        f"# Soak of {soak.facts['date']}: {soak.samples[-1].time_s / 60:.1f} minutes, {soak.facts['model']}",
        f"{soak.facts['machine']['processor']}, {soak.facts['machine']['cpu_count']} cores, commit "
        f"{soak.facts['commit']}; {soak.facts['concurrency']} clients. Made with `{soak.facts['command']}`.",
        table(("request", *RESULTS), rows),
        f"- memory of the server's processes: {before:.0f} MiB in the second quarter, {last:.0f} MiB in the last\n"
        f"- afterwards: {', '.join(f'{name} {value:g}' for name, value in soak.after.values.items())}\n"
        f"- exit code on SIGTERM: {soak.exit_code}",
        "## Faults\n\n" + ("\n".join(f"- {fault}" for fault in faults[:50]) if faults else "None."),
    ]
    return "\n\n".join(lines) + "\n"


def write(soak: Soak, directory: Path) -> None:
    """Write report.md, soak.json and memory.png."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.md").write_text(markdown(soak), encoding="utf-8")
    counts = Counter(f"{o.kind}/{o.result}" for o in soak.outcomes)
    data = {
        "facts": soak.facts,
        "outcomes": dict(counts),
        "faults": soak.faults(),
        "samples": [asdict(sample) for sample in soak.samples],
        "after": asdict(soak.after),
        "exit_code": soak.exit_code,
    }
    (directory / "soak.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    _plot(soak, directory / "memory.png")


def _plot(soak: Soak, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    memory, load = figure.subplots(2, 1, sharex=True)
    minutes = [s.time_s / 60 for s in soak.samples]
    memory.plot(minutes, [s.rss_mib for s in soak.samples], color="C0")
    memory.set_ylabel("resident memory, MiB")
    memory.set_ylim(0, 1.2 * max(s.rss_mib for s in soak.samples))
    load.plot(minutes, [s.values["running"] for s in soak.samples], color="C1", label="running")
    load.plot(minutes, [s.values["waiting"] for s in soak.samples], color="C2", label="waiting")
    load.plot(minutes, [100 * s.values["kv_usage"] for s in soak.samples], color="C3", label="KV cache, %")
    load.set_xlabel("minutes")
    load.legend(loc="upper right", fontsize=8)
    memory.set_title(f"{len(soak.outcomes)} requests, {soak.facts['concurrency']} clients", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
