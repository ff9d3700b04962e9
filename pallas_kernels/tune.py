"""The tuner: times every configuration of an op's kernel on its own device, and writes the table that `tuning` reads.

    python -m pallas_kernels.tune quantized_matmul --device H200 --case "Llama-3.1-8B" --top 4

A candidate must first give the numbers that XLA gives. It is timed as the engine runs it, many calls in one program,
with operands that together exceed the L2 cache and are never zeros (both would flatter it). `--dry-run` needs no such
device: it compiles each candidate ahead of time and lists those that would be timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import faulthandler
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels import aot
from pallas_kernels.device import KNOWN, Device, current_device
from pallas_kernels.op import GpuCase, Op
from pallas_kernels.registry import OPS

KERNEL, BASELINE = "mosaic_gpu", "xla"
TABLES = Path(__file__).parent / "tuned"
ROTATED_BYTES = 256 * 2**20  # operands that take turns; the L2 cache of an H200 has 60 MB
MOST_SETS = 32
QUICK_CALLS, LONG_CALLS = 50, 500
INSIDE = "--inside"  # the mark of a child that was started for ahead-of-time compilation
DEADLOCK_S = 300.0  # a kernel that waits for itself never ends: the process does


class TuningError(Exception):
    """The tuner cannot do what was asked; the message is for the user."""


@dataclass(frozen=True)
class Candidate:
    """A configuration and what became of it.

    Attributes:
        config: None is what runs without the kernel.
        us: microseconds per call, None if it was not timed.
        reason: why it was not.
    """

    config: Any
    us: float | None = None
    reason: str = ""


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference in units of the expected values' root mean square; inf if anything is not finite."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if not np.isfinite(a).all():
            return float("inf")
        scale = float(np.sqrt(np.mean(b**2))) or 1.0
        worst = max(worst, float(np.abs(a - b).max(initial=0.0)) / scale)
    return worst


def operand_sets(case: GpuCase) -> list[tuple[Any, ...]]:
    """Operands of different contents, so many that one call's have left the cache when their turn comes again."""
    first = case.sample(0)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    count = min(MOST_SETS, max(2, -(-ROTATED_BYTES // max(1, num_bytes))))
    return [jax.device_put(first), *(jax.device_put(case.sample(seed)) for seed in range(1, count))]


def microseconds(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], num_calls: int) -> float:
    """Time of one call, the best of three runs: of all sets in one program, as a step's layers are."""
    call = jax.jit(function)
    program = jax.jit(lambda operands: [call(*arguments) for arguments in operands])
    jax.block_until_ready(program(sets))
    jax.block_until_ready(program(sets))
    repeats, best = max(1, num_calls // len(sets)), float("inf")
    for _ in range(3):
        begin, out = time.perf_counter(), None
        for _ in range(repeats):
            out = program(sets)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - begin) / (repeats * len(sets)))
    return best * 1e6


Timer = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], int], float]


def time_case(case: GpuCase, top: int, timer: Timer = microseconds) -> list[Candidate]:
    """All candidates of a case, the best first; those that fail or give other numbers last.

    Args:
        top: how many of a quick first pass are timed thoroughly.
    """
    sets = operand_sets(case)
    baseline = case.function(BASELINE, None)
    expected = jax.jit(baseline)(*sets[0])
    quick = [_timed(case, config, sets, expected, timer) for config in case.configs]
    good = sorted((c for c in quick if c.us is not None), key=lambda c: c.us or 0.0)
    thorough = [Candidate(c.config, timer(case.function(KERNEL, c.config), sets, LONG_CALLS)) for c in good[:top]]
    thorough.append(Candidate(None, timer(baseline, sets, LONG_CALLS)))
    return sorted(thorough, key=lambda c: c.us or 0.0) + good[top:] + [c for c in quick if c.us is None]


def _timed(case: GpuCase, config: Any, sets: Sequence[tuple[Any, ...]], expected: Any, timer: Timer) -> Candidate:
    function = case.function(KERNEL, config)
    try:
        error = relative_error(jax.jit(function)(*sets[0]), expected)
        if not error <= case.tolerance:
            return Candidate(config, None, f"differs from {BASELINE} by {error:.3g}, allowed is {case.tolerance:g}")
        return Candidate(config, timer(function, sets, QUICK_CALLS))
    except Exception as failure:  # whatever a compiler or a driver says of a candidate, the others have their turn
        return Candidate(config, None, f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}")


def by_key(cases: Iterable[GpuCase]) -> Iterator[tuple[str, list[GpuCase]]]:
    """Cases that share an entry of the table."""
    ordered = sorted(cases, key=lambda case: case.key)
    for key, group in groupby(ordered, key=lambda case: case.key):
        yield key, list(group)


def best_entry(results: Sequence[Sequence[Candidate]]) -> dict[str, Any] | None:
    """The entry of the configuration with the least time over all cases of a key; None if none ran in all of them.

    Args:
        results: the candidates of each case.
    """
    times = [{repr(c.config): c for c in candidates if c.us is not None} for candidates in results]
    shared = set.intersection(*(set(t) for t in times)) - {repr(None)}
    if not shared:
        return None
    best = min(shared, key=lambda name: sum(t[name].us or 0.0 for t in times))
    entry = {"config": dataclasses.asdict(times[0][best].config), "us": _mean(t[best].us for t in times)}
    if all(repr(None) in t for t in times):
        entry[f"{BASELINE}_us"] = _mean(t[repr(None)].us for t in times)
    return entry


def _mean(values: Iterable[float | None]) -> float:
    numbers = [value for value in values if value is not None]
    return round(sum(numbers) / len(numbers), 2)


def write_entries(path: Path, device: Device, entries: dict[str, Any]) -> None:
    """Add entries to a table, replacing those of the same keys."""
    old = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.is_file() else {}
    table = {
        "device": device.kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "entries": dict(sorted({**old, **entries}.items())),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def tune(op: Op, cases: Sequence[GpuCase], device: Device, top: int, path: Path) -> None:
    """Time the cases on this machine's device and write the table after each key."""
    for key, group in by_key(cases):
        results = []
        for case in group:
            print(f"{op.name}: {case.name} ({len(case.configs)} configurations)", flush=True)
            faulthandler.dump_traceback_later(DEADLOCK_S * (1 + len(case.configs) / 10), exit=True)
            results.append(time_case(case, top))
            faulthandler.cancel_dump_traceback_later()
            for candidate in results[-1]:
                print(f"  {_line(case, candidate)}", flush=True)
        entry = best_entry(results)
        if entry is None:
            print(f"  {key}: no configuration ran in all cases; no entry written")
        else:
            write_entries(path, device, {key: entry})


def _line(case: GpuCase, candidate: Candidate) -> str:
    name = BASELINE if candidate.config is None else str(candidate.config)
    if candidate.us is None:
        return f"dropped      {name}: {candidate.reason}"
    rate = f"{case.num_bytes / candidate.us / 1e3:7.0f} GB/s {case.num_flops / candidate.us / 1e6:7.1f} TFLOP/s"
    return f"{candidate.us:9.1f} us {rate}  {name}"


def dry_run(op: Op, cases: Sequence[GpuCase], device: Device) -> int:
    """Compile every candidate ahead of time and list which would be timed; returns how many would not."""
    dropped = 0
    for case in cases:
        print(f"{op.name}: {case.name}", flush=True)
        for config in case.configs:
            try:
                compiled = aot.compile_for(device, case.function(KERNEL, config), *case.arguments)
                faults = compiled.violations(case.instructions)
            except aot.AotUnavailableError:
                raise
            except Exception as failure:  # a candidate that does not compile is a finding, not the end
                faults = [f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"]
            dropped += bool(faults)
            print(
                f"  {'dropped' if faults else 'timed  '} {config}{': ' if faults else ''}{'; '.join(faults)}",
                flush=True,
            )
    return dropped


def select(op_name: str, words: str) -> tuple[Op, list[GpuCase]]:
    """An op and those of its cases whose name contains the words.

    Raises:
        TuningError: there is no such op, or no such case.
    """
    op = next((op for op in OPS if op.name == op_name), None)
    if op is None:
        raise TuningError(f"there is no op {op_name!r}; there are: {', '.join(op.name for op in OPS)}")
    cases = op.gpu_cases()
    if not cases:
        raise TuningError(f"{op_name} has no GPU kernel, so there is nothing to tune")
    chosen = [case for case in cases if words in case.name]
    if not chosen:
        raise TuningError(f"no case of {op_name} contains {words!r}; there are: {', '.join(c.name for c in cases)}")
    return op, chosen


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("op", help="name of the operation")
    parser.add_argument("--device", required=True, type=str.lower, choices=sorted(KNOWN), help="what to tune for")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--top", type=int, default=5, help="configurations of the quick pass that are timed thoroughly")
    parser.add_argument("--dry-run", action="store_true", help="compile ahead of time, time nothing; needs no GPU")
    parser.add_argument("--out", type=Path, default=TABLES, help="directory of the tables")
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        op, cases = select(options.op, options.case)
        device = KNOWN[options.device]
        if options.dry_run and not options.inside:
            return aot.relaunch("pallas_kernels.tune", [*arguments, INSIDE])
        if options.dry_run:
            dry_run(op, cases, device)
            return 0
        here = current_device()
        if here.kind != device.kind:
            raise TuningError(
                f"tuning for {device.kind} times kernels on it, and this machine has {here.kind}; "
                "--dry-run compiles the candidates without it"
            )
        tune(op, cases, device, options.top, options.out / device.slug / f"{op.name}.json")
    except (TuningError, aot.AotUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
