"""Where the time of one engine step goes: decode at several batch sizes, and a prompt chunk.

    python -m benchmarks.profile_step [--rows 1,8,64] [--chunk 512] [--context 256] [--dtype bfloat16] [--out DIR]

Runs the real engine (its loop, scheduler and executables), first without, then with XLA's profiler, and sorts every
executed instruction by the function of our source that it comes from (`profiling/`). Device time per category adds up
to the wall time of a step; "waiting" is what the host, or threads that wake up, leave idle. The host's parts run while
the device computes and are listed beside it; "collect" is mostly waiting for the device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.profiling.attribution import Interval, mean_step, undisturbed_steps
from benchmarks.profiling.categories import UNKNOWN, category, order
from benchmarks.profiling.traffic import HOST_PARTS, Observed, Situation, bucket_of, instructions_of, observe
from engine.builder import build_engine
from engine.built import BuiltEngine
from engine.config import EngineConfig
from engine.errors import QuireError
from serving.bench.machine import machine

NS = 1e-9


@dataclass(frozen=True)
class Profile:
    """One situation. Times in seconds per step.

    Attributes:
        bucket: "tokens x sequences", padding included.
        step_s: median wall time of a step without a trace.
        traced_s: mean wall time of the middle half of the traced steps; the categories add up to it.
        categories: device time by category.
        host: host time by part.
    """

    situation: Situation
    bucket: str
    step_s: float
    traced_s: float
    categories: dict[str, float]
    host: dict[str, float]


def profile(built: BuiltEngine, situation: Situation, num_steps: int) -> Profile:
    """Observe a situation and sort its time.

    Raises:
        RuntimeError: the trace shows instructions that the program does not have.
    """
    bucket = bucket_of(built, situation)
    program = instructions_of(built, bucket)
    with tempfile.TemporaryDirectory() as directory:
        observed: Observed = observe(built, situation, num_steps, Path(directory))
    steps = undisturbed_steps(observed.events)
    intervals = [
        Interval(category(event.module, event.name, program), event.start_ns, event.stop_ns)
        for event in observed.events
    ]
    shares = mean_step(intervals, steps)
    if shares.get(UNKNOWN):
        raise RuntimeError(f"the trace of {situation.name} has instructions that bucket {bucket} does not have")
    return Profile(
        situation=situation,
        bucket=f"{bucket.num_tokens} x {bucket.num_seqs}",
        step_s=observed.step_s,
        traced_s=sum(step.length_ns for step in steps) * NS / len(steps),
        categories={name: shares[name] * NS for name in order() if name in shares},
        host=observed.host_s,
    )


def markdown(profiles: Sequence[Profile], about: dict[str, Any]) -> str:
    """Two tables: the device's categories, the host's parts."""
    head = [p.situation.name for p in profiles]
    rows = [["bucket (tokens x sequences)", *(p.bucket for p in profiles)]]
    for name in order():
        if any(name in p.categories for p in profiles):
            rows.append([name, *(_milliseconds(p.categories.get(name, 0.0), p.traced_s) for p in profiles)])
    rows.append(["**step, traced**", *(f"{p.traced_s * 1e3:.2f}" for p in profiles)])
    rows.append(["**step, not traced (median)**", *(f"{p.step_s * 1e3:.2f}" for p in profiles)])
    host = [[part, *(f"{p.host[part] * 1e3:.3f}" for p in profiles)] for part in HOST_PARTS]
    return "\n\n".join(
        (
            f"# Where a step's time goes: {about['model']}, {about['dtype']}",
            f"{about['machine']['processor']}, {about['machine']['cpu_count']} cores, {about['machine']['platform']}; "
            f"{', '.join(f'{name} {version}' for name, version in about['machine']['versions'].items())}; "
            f"{about['num_steps']} steps each, the middle half of the traced ones by wall time; contexts start at "
            f"{about['context']} tokens.",
            "## Device, ms per step (share)\n\n" + table(["category", *head], rows),
            "## Host, ms per step, while the device computes (collect includes waiting for it)\n\n"
            + table(["part", *head], host),
        )
    )


def _milliseconds(seconds: float, of: float) -> str:
    return f"{seconds * 1e3:.2f} ({100 * seconds / of:.0f} %)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description="Where a step's time goes.")
    parser.add_argument("--model", default="demo", help="model reference (default: demo)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--rows", type=_numbers, default=(1, 8, 64), help="sequences that decode (default: 1,8,64)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prompt chunk, 0 = none (default: 512)")
    parser.add_argument("--context", type=int, default=256, help="of decoding sequences, in tokens (default: 256)")
    parser.add_argument("--steps", type=int, default=20, help="per situation (default: 20)")
    parser.add_argument("--attention", default="auto", help="implementation of paged attention (default: auto)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write profile.json and profile.md there")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,8,64") from None


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """An engine whose steps take in exactly one chunk, and all rows."""
    longest = max(args.context, args.chunk) + 4 * args.steps + 256
    return {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": longest,
        "max_num_seqs": max((*args.rows, 1)),
        "max_num_batched_tokens": max(args.chunk or args.context, *args.rows),
        "skip_tokenizer_init": True,
        "attention_implementation": args.attention,
    }


def run(args: argparse.Namespace) -> tuple[list[Profile], dict[str, Any]]:
    """Profile all situations with one engine.

    Raises:
        QuireError: the engine cannot start.
    """
    situations = [Situation(f"{rows} rows" if rows > 1 else "1 row", rows, args.context) for rows in args.rows]
    if args.chunk:
        situations.append(Situation(f"{args.chunk}-token chunk", 0, args.chunk))
    built = build_engine(EngineConfig.from_flat(**_settings(args)))
    # The first trace of a process slows what it watches down to a third for about half a second (measured).
    with tempfile.TemporaryDirectory() as directory:
        observe(built, situations[0], args.steps, Path(directory))
    profiles = []
    for situation in situations:
        print(f"profiling {situation.name}", file=sys.stderr)
        profiles.append(profile(built, situation, args.steps))
    about = {
        "model": args.model,
        "dtype": args.dtype,
        "context": args.context,
        "num_steps": args.steps,
        "machine": machine(),
        "engine": built.describe(),
    }
    return profiles, about


def main() -> int:
    """Profile and print."""
    args = _parser().parse_args()
    try:
        # What the engine prints must not end up in the table.
        with contextlib.redirect_stdout(sys.stderr):
            profiles, about = run(args)
    except QuireError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = markdown(profiles, about) + "\n"
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {"about": about, "profiles": [asdict(p) for p in profiles]}
        (args.out / "profile.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (args.out / "profile.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
