"""The process in which `tests.kernels.simulated` runs kernels: `python -m tests.kernels.simulator_worker FD`."""

from __future__ import annotations

import faulthandler
import sys
import traceback
import warnings
from multiprocessing.connection import Connection

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from tests.kernels.simulated import Answer, Task

DEPRECATIONS = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)


class RaceStates:
    """Every race detector that the simulator made: it makes one per kernel and keeps only the last."""

    def __init__(self) -> None:
        self._states: list[gpu_callbacks.GPURaceDetectionState] = []
        original = gpu_callbacks.GPURaceDetectionState

        def remember(*args: object, **kwargs: object) -> gpu_callbacks.GPURaceDetectionState:
            state = original(*args, **kwargs)  # type: ignore[arg-type]
            self._states.append(state)
            return state

        gpu_callbacks.GPURaceDetectionState = remember  # type: ignore[assignment,misc]

    def take(self) -> list[gpu_callbacks.GPURaceDetectionState]:
        """Those since the last call."""
        taken, self._states = self._states, []
        return taken


def _on_host(leaf: object) -> object:
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf


def answer(task: Task, states: RaceStates) -> Answer:
    """Run a task."""
    detail, value = "", None
    jax.clear_caches()  # a kernel with a fault put in must not be answered by one that was traced without it
    try:
        value = jax.tree.map(_on_host, task.body(*task.arguments))
        jax.effects_barrier()
    except Exception:
        detail = traceback.format_exc()
    taken = states.take()
    if any(state.races_found for state in taken):
        return Answer("race", None, f"a race. {detail}", len(taken))
    if detail:
        return Answer("failed", None, detail, len(taken))
    return Answer("passed", value, "", len(taken))


def main() -> None:
    """Answer tasks until the other side closes the pipe."""
    connection, states = Connection(int(sys.argv[1])), RaceStates()
    for category in DEPRECATIONS:
        warnings.simplefilter("error", category)
    connection.send("ready")
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            return
        # The alarm is a thread in C: it needs no lock that a hanging kernel may hold.
        faulthandler.dump_traceback_later(task.timeout_s, exit=True)
        result = answer(task, states)
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        connection.send(result)


if __name__ == "__main__":
    main()
