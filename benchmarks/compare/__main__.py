"""`python -m benchmarks.compare`: measure, then write results.json, report.md and the plots."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.driver import Comparison, Plan, with_agreement
from benchmarks.compare.environments import ENVIRONMENTS, PeerEnvironmentError, clean_process_environment, peer_python
from benchmarks.compare.journal import Journal, JournalError
from benchmarks.compare.model_forms import model_for
from benchmarks.compare.peer import Peer
from benchmarks.compare.process import WorkerError, WorkerGoneError, WorkerProcess
from benchmarks.compare.registry import DEFAULT, PEERS, REFERENCE
from benchmarks.compare.report import markdown
from benchmarks.compare.results import Results, RunInfo
from benchmarks.compare.starts import StartTimer
from benchmarks.roofline import ModelCosts, model_config, num_cores
from benchmarks.workloads.cpu_smollm2 import ALL, STREAMS, VOCAB_HIGH, WORKLOADS, Workload, check
from engine.errors import QuireError
from serving.bench.machine import machine

ROOT = Path(__file__).resolve().parents[2]
LOCAL_RESULTS = ROOT / "benchmarks" / "results" / "local"
LONGEST = 2304  # tokens of the longest request, with room: W3 has 2049
KV_CACHE_BYTES = 4 * 2**30  # the same for every engine that has a fixed cache
# (requests, most output tokens)
QUICK_CUTS = {"w2": (16, 48), "w4": (8, 16)} | {name: (stream.num_requests, 8) for name, stream in STREAMS.items()}
QUICK_REPS = 1
GROUPS = {"streams": tuple(STREAMS), "none": ()}  # names of `--workload` that stand for others
TIME_IS_OVER = 3  # exit status: turns are left

_VARIANTS = tuple(dict.fromkeys(v for peer in PEERS.values() for ways in peer.variants.values() for v in ways))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Quire and its peers, in turns.")
    parser.add_argument("--peers", type=_names(PEERS), default=DEFAULT, metavar="A,B", help=f"of {', '.join(PEERS)}")
    parser.add_argument(
        "--workload",
        type=_workloads,
        default=tuple(ALL),
        metavar="W1,W2",
        help=f"of {', '.join(WORKLOADS)} and streams (or some of {', '.join(STREAMS)}), or none; default: all",
    )
    parser.add_argument(
        "--starts", type=_positive, default=0, metavar="N", help="also time N cold and N warm starts of each engine"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the results in --out: add what is missing")
    parser.add_argument(
        "--limit", type=float, metavar="S", help="begin nothing that would probably end after so many seconds"
    )
    parser.add_argument(
        "--skip-variants", type=_names(_VARIANTS), default=(), metavar="A,B", help=f"of {', '.join(_VARIANTS)}"
    )
    parser.add_argument("--reps", type=_positive, default=3, metavar="N", help="repetitions that count (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one repetition, W2 and W4 cut: to see that all works")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--model", default="demo", help="model of all engines (default: demo, the workloads' own)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: a dated folder in benchmarks/results/local")
    parser.add_argument(
        "--quiet-wait", type=float, default=0.0, metavar="S", help="wait before each job, at most so long, for others"
    )
    parser.add_argument(
        "--nice", type=int, default=0, metavar="N", help="niceness of all workers; less than 0 needs privileges"
    )
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="S", help="of one job (default: 3600)")
    for name in ENVIRONMENTS:
        parser.add_argument(f"--env-{name}", metavar="PYTHON", help="an interpreter to use instead of making one")
    parser.add_argument("--render", type=Path, metavar="JSON", help="report on earlier results again; measure nothing")
    return parser


def _names(known: Any) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return parse


def _workloads(text: str) -> tuple[str, ...]:
    names = _names((*ALL, *GROUPS))(text)
    return tuple(dict.fromkeys(name for given in names for name in GROUPS.get(given, (given,))))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def make_plan(args: argparse.Namespace) -> Plan:
    """What the arguments ask for. The reference comes first, and is always there."""
    names = (REFERENCE, *(name for name in args.peers if name != REFERENCE))
    workloads: list[Workload] = [ALL[name] for name in args.workload]
    for workload in workloads:
        check(workload)
    if args.quick:
        workloads = [w.cut(*QUICK_CUTS[w.name]) if w.name in QUICK_CUTS else w for w in workloads]
    return Plan(
        peers=tuple(PEERS[name].without(args.skip_variants) for name in names),
        workloads=tuple(workloads),
        num_repetitions=QUICK_REPS if args.quick else args.reps,
        timeout_s=args.timeout,
        quiet_wait_s=args.quiet_wait,
        deadline=None if args.limit is None else time.monotonic() + args.limit,
    )


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changes = git("status", "-s", "--", ".", ":!benchmarks/results")  # a part must not change what the next one sees
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if changes else "")


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same in all parts of a run, so that they can be put together."""
    return {"commit": _commit(), "dtype": args.dtype, "model": args.model, "quick": args.quick}


def run(args: argparse.Namespace, plan: Plan, journal: Journal, out: Path) -> int:
    """Measure what the journal does not hold yet. Returns the number of turns and starts that are left.

    Raises:
        QuireError, PeerEnvironmentError, WorkerError, WorkerGoneError: something cannot be made ready.
    """
    if model_config(args.model).vocab_size < VOCAB_HIGH:
        raise PeerEnvironmentError(f"the workloads use token ids up to {VOCAB_HIGH - 1}; {args.model!r} has fewer.")
    pythons = {peer.name: peer_python(peer.environment, _chosen(args, peer.environment)) for peer in plan.peers}
    models = {peer.name: model_for(peer.model, args.model, args.dtype, pythons[peer.name]) for peer in plan.peers}
    cores = num_cores()

    def start(peer: Peer, variables: Mapping[str, str] | None = None) -> WorkerProcess:
        # Another environment must not find our packages; our own keeps all variables.
        base = clean_process_environment() if peer.environment else dict(os.environ)
        base |= {"OMP_NUM_THREADS": str(cores)} | dict(peer.process_environment) | dict(variables or {})
        command = [*(("nice", "-n", str(args.nice)) if args.nice else ()), str(pythons[peer.name]), "-m", peer.module]
        return WorkerProcess(command, base, ROOT, out / f"{peer.name}.log")

    def settings(peer: Peer) -> dict[str, Any]:
        common = {
            "model": models[peer.name],
            "dtype": args.dtype,
            "num_threads": cores,
            "max_model_len": LONGEST,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
        }
        return common | dict(peer.settings)

    with Comparison(plan, start, settings, journal) as comparison:
        left = comparison.load()
        if left:
            comparison.ceilings()
            left = comparison.measure()
            comparison.ceilings()
    return left + StartTimer(plan, start, settings, journal).measure(args.starts)


def results_of(args: argparse.Namespace, journal: Journal) -> Results:
    """Everything that the journal holds."""
    measured = {m.workload for m, _ in journal.measurements}
    info = RunInfo(
        date=journal.parts[0]["date"],
        commit=_commit(),
        command=" && ".join(dict.fromkeys(part["command"] for part in journal.parts)),
        machine=machine(),
        dtype=args.dtype,
        num_repetitions=max((m.repetition for m, _ in journal.measurements), default=0),
        cut=args.quick,
    )
    cuts = QUICK_CUTS if args.quick else {}
    workloads = {name: w.cut(*cuts[name]) if name in cuts else w for name, w in ALL.items() if name in measured}
    costs = ModelCosts.of(model_config(args.model), args.dtype)
    measurements = with_agreement(journal, REFERENCE)
    return Results(info, workloads, journal.peers, journal.ceilings, costs, measurements, journal.starts)


def _chosen(args: argparse.Namespace, environment: str) -> str | None:
    return vars(args)[f"env_{environment.replace('-', '_')}"] if environment else None


def _published_command(arguments: Sequence[str]) -> str:
    """The command, without what only this machine has: results are published."""
    shown = [re.sub(rf"[^=]*{re.escape(os.sep)}.*", "PATH", argument, flags=re.DOTALL) for argument in arguments]
    return shlex.join(["python", "-m", "benchmarks.compare", *shown])


def write(results: Results, out: Path) -> None:
    """Write results.json, report.md and, if matplotlib is there, the plots; print the report."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results.as_json(), indent=1) + "\n", encoding="utf-8")
    text = markdown(results, REFERENCE)
    (out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    if has_matplotlib():
        importlib.import_module("benchmarks.compare.plots").draw(results, out)
    print(f"written to {out}", file=sys.stderr)


def has_matplotlib() -> bool:
    """True if plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def main() -> int:
    """Measure or render. 0: all went well; 1: a measurement failed, or nothing could be measured; 3: some are left."""
    args = _parser().parse_args()
    if not has_matplotlib():
        print(
            "no plots: matplotlib is missing (pip install 'quire-llm[bench]'); --render draws them later",
            file=sys.stderr,
        )
    if args.render is not None:
        results = Results.from_json(json.loads(args.render.read_text(encoding="utf-8")))
        write(results, args.out or args.render.parent)
        return 0
    plan = make_plan(args)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    out = args.out or LOCAL_RESULTS / f"compare-{stamp}-{args.dtype}"
    out.mkdir(parents=True, exist_ok=True)
    try:
        journal = Journal(out, conditions(args), resume=args.resume)
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        journal.begin_part({"date": date, "command": _published_command(sys.argv[1:])})
        left = run(args, plan, journal, out)
    except (QuireError, PeerEnvironmentError, WorkerError, WorkerGoneError, JournalError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results = results_of(args, journal)
    write(results, out)
    if left:
        return TIME_IS_OVER
    failed = any(m.error is not None for m in results.measurements) or any(s.error is not None for s in results.starts)
    return 1 if failed else 0


def _terminated(number: int, _: object) -> None:
    """Leave through all `with` statements, so that workers are ended; a second signal must not cut that short."""
    signal.signal(number, signal.SIG_IGN)
    print(f"ended by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
