"""Everything that is to be measured on a GPU, in one command.

    python -m benchmarks.gpu_session                          all parts, into benchmarks/results/<device>/<date>/
    python -m benchmarks.gpu_session --part numerics          one part (may be repeated)
    python -m benchmarks.gpu_session --out DIR --resume       go on where an earlier session stopped
    python -m benchmarks.gpu_session --smoke                  tiny shapes on the CPU: does the code run?

Needs no network and no weights. A part takes less than eight minutes; `--limit` ends the session earlier, and what was
not done is left for `--resume`. See `benchmarks/gpu/` and `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.part import Context, Part
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.records import DONE, SKIPPED
from benchmarks.gpu.report import markdown
from benchmarks.gpu.session import ROOT, Session

REGISTRY = "benchmarks.gpu.parts"
RESULTS = ROOT / "benchmarks" / "results"
ASK_S = 120.0
WHICH_DEVICE = (
    "import json; from pallas_kernels.device import current_device; d = current_device(); print(json.dumps([d.kind, "
    "d.slug]))"
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session", description="All that a GPU is for.")
    parser.add_argument("--part", action="append", choices=tuple(PARTS), metavar="NAME", help="only this part")
    parser.add_argument("--list", action="store_true", help="list the parts and the number of their cases")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>/<date>")
    parser.add_argument("--resume", action="store_true", help="keep what is in DIR, run what has not ended")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), metavar="S", help="end after S seconds, the rest is for --resume"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU; the figures mean nothing")
    return parser


def device_names(smoke: bool) -> tuple[str, str]:
    """Name and folder name of this machine's device, asked in a process of its own: this one must not hold it.

    Raises:
        RuntimeError: JAX finds none, or does not answer.
    """
    if smoke:
        return "CPU", "local/gpu-smoke"
    try:
        command = [sys.executable, "-c", WHICH_DEVICE]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=ASK_S, check=True)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"JAX did not find a device within {ASK_S:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"JAX finds no device: {error.stderr.strip()[-300:]}") from error
    kind, slug = json.loads(done.stdout.strip().splitlines()[-1])
    return kind, slug


def commit() -> str:
    """The commit of this tree, and whether it was changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--short", "--untracked-files=no")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if changed else "")


def run_parts(session: Session, parts: list[Part], limit_s: float, *, resume: bool) -> bool:
    """Run parts one after the other; the report is written after each, so that there always is one.

    Returns:
        Whether all of them came to their end and no case failed, hung or died.
    """
    until, sound = time.monotonic() + limit_s, True
    for part in parts:
        file = session.file(part)
        if not resume:
            file.path.unlink(missing_ok=True)
            file.path.with_suffix(".log").unlink(missing_ok=True)
        if resume and not session.pending(part):
            session.say(f"{part.name}: complete, skipped")
        sound &= session.run(part, until - time.monotonic())
        sound &= all(ended.status in (DONE, SKIPPED) for ended in file.ended().values())
        write_report(session.context)
    return sound


def write_report(context: Context) -> str:
    """Write report.md from all result files of the folder, and return its text."""
    session = Session(context, REGISTRY)
    files = {name: session.file(part) for name, part in PARTS.items()}
    about = json.loads((context.out / "session.json").read_text(encoding="utf-8"))
    records = {name: file.results() for name, file in files.items()}
    text = markdown(about, list(PARTS.values()), records, {name: file.ended() for name, file in files.items()})
    (context.out / "report.md").write_text(text, encoding="utf-8")
    return text


def _about(kind: str, smoke: bool) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": kind,
        "commit": commit(),
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "smoke": smoke,
    }


def write_about(file: Path, about: dict[str, Any], *, resume: bool) -> None:
    """Write what a session is. A resumed one stays what it was; another commit or device is added to the first."""
    if resume and file.is_file():
        first = json.loads(file.read_text(encoding="utf-8"))
        for name in ("commit", "device", "jax"):
            if about[name] not in first[name].split(", then "):
                first[name] += f", then {about[name]}"
        about = first
    file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Run, and print the report. 0: everything was measured; 1: something failed, hung, died or is left."""
    args = _parser().parse_args()
    jax.config.update("jax_platforms", "cpu")  # of this process, which only lists cases: workers have the GPU
    chosen = [part for name, part in PARTS.items() if args.part is None or name in args.part]
    if args.list:
        for part in chosen:
            cases = len(part.cases(args.smoke))
            print(f"{part.name:<12} {cases:>4} cases, at most {part.limit_s:.0f} s at a time: {part.about}")
        return 0
    try:
        kind, slug = device_names(args.smoke)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    out = (args.out or RESULTS / slug / today).resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_about(out / "session.json", _about(kind, args.smoke), resume=args.resume)
    context = Context(out, args.smoke)
    sound = run_parts(Session(context, REGISTRY), chosen, args.limit, resume=args.resume)
    print(write_report(context))
    shutil.rmtree(out / "models", ignore_errors=True)
    print(f"written to {out}", file=sys.stderr)
    return 0 if sound else 1


def _terminated(number: int, _: object) -> None:
    """Leave through all `with` statements, so that workers are ended."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
