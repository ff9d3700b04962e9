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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.driver import Comparison, Plan
from benchmarks.compare.environments import ENVIRONMENTS, PeerEnvironmentError, clean_process_environment, peer_python
from benchmarks.compare.model_forms import model_for
from benchmarks.compare.peer import Peer
from benchmarks.compare.process import WorkerError, WorkerGoneError, WorkerProcess
from benchmarks.compare.registry import DEFAULT, PEERS, REFERENCE
from benchmarks.compare.report import markdown
from benchmarks.compare.results import Results, RunInfo
from benchmarks.roofline import ModelCosts, model_config, num_cores
from benchmarks.workloads.cpu_smollm2 import VOCAB_HIGH, WORKLOADS, Workload, check
from engine.errors import QuireError
from serving.bench.machine import machine

ROOT = Path(__file__).resolve().parents[2]
LOCAL_RESULTS = ROOT / "benchmarks" / "results" / "local"
LONGEST = 2304  # tokens of the longest request, with room: W3 has 2049
KV_CACHE_BYTES = 4 * 2**30  # the same for every engine that has a fixed cache
QUICK_CUTS = {"w2": (16, 48), "w4": (8, 16)}  # (requests, most output tokens)
QUICK_REPS = 1

_VARIANTS = tuple(dict.fromkeys(v for peer in PEERS.values() for ways in peer.variants.values() for v in ways))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Quire and its peers, in turns.")
    parser.add_argument("--peers", type=_names(PEERS), default=DEFAULT, metavar="A,B", help=f"of {', '.join(PEERS)}")
    parser.add_argument(
        "--workload", type=_names(WORKLOADS), default=tuple(WORKLOADS), metavar="W1,W2", help="default: all"
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def make_plan(args: argparse.Namespace) -> Plan:
    """What the arguments ask for. The reference comes first, and is always there."""
    names = (REFERENCE, *(name for name in args.peers if name != REFERENCE))
    workloads: list[Workload] = [WORKLOADS[name] for name in args.workload]
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
    )


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if git("status", "-s") else "")


def run(args: argparse.Namespace, plan: Plan, out: Path) -> Results:
    """Measure.

    Raises:
        QuireError, PeerEnvironmentError, WorkerError, WorkerGoneError: something cannot be made ready.
    """
    pythons = {peer.name: peer_python(peer.environment, _chosen(args, peer.environment)) for peer in plan.peers}
    models = {peer.name: model_for(peer.model, args.model, pythons[peer.name]) for peer in plan.peers}
    config = model_config(args.model)
    if config.vocab_size < VOCAB_HIGH:
        raise PeerEnvironmentError(f"the workloads use token ids up to {VOCAB_HIGH - 1}; {args.model!r} has fewer.")
    cores = num_cores()

    def start(peer: Peer) -> WorkerProcess:
        # Another environment must not find our packages; our own keeps all variables.
        base = clean_process_environment() if peer.environment else dict(os.environ)
        variables = base | {"OMP_NUM_THREADS": str(cores)} | dict(peer.process_environment)
        command = [*(("nice", "-n", str(args.nice)) if args.nice else ()), str(pythons[peer.name]), "-m", peer.module]
        return WorkerProcess(command, variables, ROOT, out / f"{peer.name}.log")

    def settings(peer: Peer) -> dict[str, Any]:
        common = {
            "model": models[peer.name],
            "dtype": args.dtype,
            "num_threads": cores,
            "max_model_len": LONGEST,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
        }
        return common | dict(peer.settings)

    with Comparison(plan, start, settings) as comparison:
        facts = comparison.load()
        before = comparison.ceilings()
        measurements = comparison.measure()
        ceilings = before.merged(comparison.ceilings())
    info = RunInfo(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=_commit(),
        command=_published_command(sys.argv[1:]),
        machine=machine(),
        dtype=args.dtype,
        num_repetitions=plan.num_repetitions,
        cut=args.quick,
    )
    costs = ModelCosts.of(config, args.dtype)
    return Results(info, {w.name: w for w in plan.workloads}, facts, ceilings, costs, measurements)


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
    """Measure or render. 0: all went well; 1: a measurement failed, or nothing could be measured."""
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
        results = run(args, plan, out)
    except (QuireError, PeerEnvironmentError, WorkerError, WorkerGoneError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write(results, out)
    return 1 if any(m.error is not None for m in results.measurements) else 0


def _terminated(number: int, _: object) -> None:
    """Leave through all `with` statements, so that workers are ended."""
    print(f"ended by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
