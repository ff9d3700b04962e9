"""`Supervisor`: keeps one worker process alive, starts it again once, and knows why it is not there. No jax."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from engine.config import EngineConfig
from engine.errors import EngineDeadError, EngineRestartingError, QuireError
from engine.remote.process import WorkerProcess
from engine.remote.wire import Failed, FromWorker, Ready, Start, Stop, ToWorker, error_from_wire

logger = logging.getLogger("quire.remote")

# A process that ends again within this time of its new start ends of something that a new start does not heal.
RESTART_INTERVAL_S = 600.0
CLOSE_TIMEOUT_S = 10.0
_REAP_TIMEOUT_S = 5.0  # from the end of its socket to the end of a process


class Supervisor:
    """The life of the engine's process, for one event loop.

    Args:
        config: of the engine.
        receive: called with each message but those of start and end.
        went_down: called with the reason each time that there is no process any more: all that waits for it must end.

    Attributes:
        num_restarts: how often the process was started again.
    """

    def __init__(
        self,
        config: EngineConfig,
        receive: Callable[[FromWorker], None],
        went_down: Callable[[EngineDeadError], None],
    ) -> None:
        self.num_restarts = 0
        self._config, self._receive, self._went_down = config, receive, went_down
        self._worker: WorkerProcess | None = None  # one that is ready
        self._ready: asyncio.Future[Ready] | None = None  # while one starts
        self._down: EngineDeadError | None = EngineDeadError("the engine has not been started.")
        self._last_words: str | None = None
        self._restarted_at: float | None = None
        self._recovery: asyncio.Task[None] | None = None

    async def start(self) -> Ready:
        """Start a process and wait until its engine is ready. If the wait is cancelled the process is ended.

        Raises:
            QuireError: what it said; EngineDeadError if it ended without a word.
        """
        self._ready = asyncio.get_running_loop().create_future()
        worker = await WorkerProcess.start(self._on_message, self._on_lost)
        try:
            worker.send(Start(self._config.flat(), logging.getLogger("quire").getEffectiveLevel()))
            ready = await self._ready
        except EOFError:
            how = await worker.ended(_REAP_TIMEOUT_S)
            raise EngineDeadError(f"the engine process ended while it started ({how}).") from None
        except BaseException:
            worker.kill()
            await worker.ended(_REAP_TIMEOUT_S)
            raise
        finally:
            self._ready = None
        self._worker, self._down, self._last_words = worker, None, None
        logger.info("the engine process %d is ready", worker.pid)
        return ready

    @property
    def pid(self) -> int | None:
        """Of the process that is ready; None while there is none."""
        return None if self._worker is None else self._worker.pid

    def require_up(self) -> None:
        """Return if there is a process that is ready.

        Raises:
            EngineRestartingError: there will be one soon.
            EngineDeadError: there will be none.
        """
        if self._down is not None:
            raise type(self._down)(str(self._down))

    def send(self, message: ToWorker) -> None:
        """Send a message; nothing happens if there is no process.

        Raises:
            MessageTooLongError: nothing was sent.
        """
        if self._worker is not None:
            self._worker.send(message)

    async def close(self) -> None:
        """Tell the process to stop after its step and wait for its end; kill it after `CLOSE_TIMEOUT_S`."""
        worker, self._worker = self._worker, None
        self._go_down(EngineDeadError("the engine was shut down."))
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
            self._recovery = None
        if worker is not None:
            worker.send(Stop())
            await worker.ended(CLOSE_TIMEOUT_S)

    def _on_message(self, message: FromWorker) -> None:
        match message:
            case Ready():
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(message)
            case Failed(error):
                if self._ready is None:
                    self._last_words = error.message
                elif not self._ready.done():
                    self._ready.set_exception(error_from_wire(error))
            case _:
                self._receive(message)

    def _on_lost(self, worker: WorkerProcess) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(EOFError())
        elif worker is self._worker:
            self._worker = None
            self._down = EngineRestartingError("the engine process ended unexpectedly; restarting.")
            self._recovery = asyncio.get_running_loop().create_task(self._recover(worker))

    async def _recover(self, worker: WorkerProcess) -> None:
        """Tell everybody, and start a new process if that may help."""
        how = await worker.ended(_REAP_TIMEOUT_S)
        reason = f"the engine process ended unexpectedly ({how})"
        if self._last_words is not None:
            reason += f": {self._last_words}"
        now = time.monotonic()
        if self._restarted_at is not None and now - self._restarted_at < RESTART_INTERVAL_S:
            since = round(now - self._restarted_at)
            self._give_up(f"{reason}; it was restarted {since} s ago and is not restarted again.")
            return
        logger.error("%s; restarting", reason)
        self._go_down(EngineRestartingError(f"{reason}; restarting."))
        self._restarted_at = now
        self.num_restarts += 1
        try:
            await self.start()
        except QuireError as error:
            self._give_up(f"the engine process could not be started again: {error}")
        except OSError as error:
            self._give_up(f"the engine process could not be started again: {error.strerror or error}")

    def _give_up(self, reason: str) -> None:
        logger.error("%s", reason)
        self._go_down(EngineDeadError(reason))

    def _go_down(self, why: EngineDeadError) -> None:
        self._down = why
        self._went_down(why)
