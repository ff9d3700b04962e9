"""Faulty workers: each module changes one thing of the real one and then is it. `process.WORKER_MODULE` names it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from engine.core import EngineCore
from engine.remote import worker
from engine.runtime.executor import Executor, InFlightStep
from engine.scheduling.plan import StepPlan


def serve() -> None:
    """Be the worker."""
    sys.exit(worker.main())


def before_each_step(action: Callable[[], None]) -> None:
    """Do something before each step."""
    step = EngineCore.step

    def changed(core: EngineCore) -> list:
        action()
        return step(core)

    EngineCore.step = changed  # type: ignore[method-assign]


def fail_dispatch_if(fails: Callable[[int], bool]) -> None:
    """Raise in the dispatches whose number, from 0, `fails` says."""
    dispatch, count = Executor.dispatch, iter(range(10**9))

    def changed(executor: Executor, plan: StepPlan) -> InFlightStep:
        step = dispatch(executor, plan)
        if fails(next(count)):
            raise RuntimeError("injected")
        return step

    Executor.dispatch = changed  # type: ignore[method-assign]
