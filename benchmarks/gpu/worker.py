"""The process that measures: runs cases of one part, one after the other, and tells the session of each.

    python -m benchmarks.gpu.worker REGISTRY PART OUT CASES [--smoke]

REGISTRY is the module that holds `PARTS`, CASES a JSON list of names. Lines go to what stdout was when it started;
whatever the cases print goes to stderr, which is the part's log.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Case, Context, Part, Record, Skip
from benchmarks.gpu.records import DONE, FAILED, SKIPPED

LONGEST_REASON = 600
LOST_DEVICE_EXIT = 4
PARENT_CHECK_S = 1.0


def run_case(part: Part, case: Case, context: Context, emit: Callable[[Record], None]) -> str:
    """Run one case and tell of it; returns its status. No exception of the case leaves this function."""
    emit({"event": "begin", "case": case.name, "at": time.strftime("%Y-%m-%d %H:%M:%S")})
    started, status, reason = time.monotonic(), DONE, ""
    try:
        for record in part.run(case, context):
            emit({**record, "event": "result", "case": case.name})
    except Skip as skip:
        status, reason = SKIPPED, str(skip)
    except Exception as error:  # any: a session goes on
        traceback.print_exc()
        status, reason = FAILED, f"{type(error).__name__}: {error}"[:LONGEST_REASON]
    end = {"event": "end", "case": case.name, "status": status, "seconds": round(time.monotonic() - started, 3)}
    emit(end | ({"reason": reason} if reason else {}))
    return status


def device_is_lost() -> bool:
    """True if the device answers no more: after a fault in a kernel, every later call of the process fails too."""
    jax = sys.modules.get("jax")
    if jax is None:
        return False
    try:
        (jax.numpy.ones(8) + 1).block_until_ready()
    except Exception:
        return True
    return False


def end_with_parent(parent: int) -> None:
    """End this process, and all that it started, soon after its parent: a session that was killed must not leave a
    process behind that holds the device. Works from a thread, so also while a kernel hangs.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> int:
    """Run the cases that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("registry")
    parser.add_argument("part")
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", type=json.loads)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)

        def emit(event: dict[str, Any]) -> None:
            lines.write(json.dumps(event, default=str) + "\n")
            lines.flush()

        # Everything here compiles in a process that may hold a ready engine; `engine` counts what matters itself.
        logging.getLogger("quire.compile").setLevel(logging.ERROR)
        part: Part = importlib.import_module(args.registry).PARTS[args.part]
        context = Context(args.out, args.smoke)
        cases = {case.name: case for case in part.cases(args.smoke)}
        for name in args.cases:
            if run_case(part, cases[name], context, emit) == FAILED and device_is_lost():
                return LOST_DEVICE_EXIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
