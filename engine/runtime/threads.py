"""Keeps XLA's worker threads of a CPU on cores of their own.

A worker that slept for a while may be woken on the core where another one runs, and the kernel needs some 20 ms to see
it: of two cores one idles, and the first step after a pause takes a third longer (128 tokens of SmolLM2-135M: 77
instead of 58 ms, every other time). A thread per core, as XLA makes them, loses nothing by staying where it is.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger("quire.threads")

WORKER_NAME = "tf_XLAEigen"
TASKS = Path("/proc/self/task")


def pin_workers(tasks: Path = TASKS) -> int:
    """Pin each of XLA's workers to a core, if there is exactly one for every core that this process may use.

    Returns:
        How many were pinned: 0 where threads cannot be seen or pinned, or where someone chose another number of them.
    """
    if not hasattr(os, "sched_setaffinity"):
        return 0
    cores, workers = sorted(os.sched_getaffinity(0)), _workers(tasks)
    if len(workers) != len(cores):
        logger.debug("%d workers of XLA on %d cores: not pinned", len(workers), len(cores))
        return 0
    try:
        for worker, core in zip(workers, cores, strict=True):
            os.sched_setaffinity(worker, {core})
    except OSError as error:
        logger.debug("XLA's workers cannot be pinned: %s", error)
        return 0
    logger.info("pinned %d workers of XLA to a core each", len(workers))
    return len(workers)


def _workers(tasks: Path) -> list[int]:
    """Thread ids of XLA's workers, ascending."""
    found = []
    for task in tasks.glob("*"):
        try:
            if (task / "comm").read_text().strip() == WORKER_NAME:
                found.append(int(task.name))
        except OSError:
            continue  # ended meanwhile
    return sorted(found)
