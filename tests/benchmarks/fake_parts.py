"""A registry of parts for the session's tests: no device, no jax, and every way in which a case can end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu.part import Case, Context, Part, Record, Records, Skip


def _run(case: Case, context: Context) -> Iterator[Record]:
    yield {"pid": os.getpid(), "flag": os.environ.get("FAKE_FLAG", ""), "xla": os.environ.get("XLA_FLAGS", "")}
    print("what a case prints must not disturb its lines")
    match case.name:
        case "skips":
            raise Skip("there is nothing to measure here")
        case "raises":
            raise ValueError("this case is wrong")
        case "hangs":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (context.out / "child").write_text(str(child.pid))
            time.sleep(600)
        case "dies":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(7)
        case "slow":
            time.sleep(3.0)
    yield {"second": True}


def _report(records: Records) -> str:
    return f"{len(records['fake'])} results"


_ENDS = ("first", "skips", "raises", "after a failure", "hangs", "after a hang", "dies", "after a death")


def _part(name: str, cases: list[Case], **more: float) -> Part:
    return Part(name, "cases that end in every way", lambda smoke: cases, _run, _report, **more)  # type: ignore[arg-type]


_ALONE = Case("alone", own_process=True, environment={"FAKE_FLAG": "set", "XLA_FLAGS": "--second"})
PARTS = {
    "fake": _part("fake", [*(Case(name, timeout_s=1.5 if name == "hangs" else 30.0) for name in _ENDS), _ALONE]),
    "long": _part("long", [Case("hangs", timeout_s=300.0)]),
    "short": _part("short", [Case("quick"), Case("slow"), Case("later")], limit_s=2.0),
}
