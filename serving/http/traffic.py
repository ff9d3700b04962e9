"""`Traffic`: what is going on now, so that it can be limited, counted and drained."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from serving.http.errors import RETRY_AFTER, ApiError


class Traffic:
    """Counts the requests that do work and knows their ids in the engine.

    Args:
        limit: most at a time; None = no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.draining = False
        self.num_live = 0
        self.engine_ids: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Count one request while inside.

        Raises:
            ApiError: the server shuts down, or the limit is reached.
        """
        if self.draining:
            raise ApiError(503, "The server is shutting down.", headers={"Connection": "close", **RETRY_AFTER})
        if self.limit is not None and self.num_live >= self.limit:
            raise ApiError(503, f"The server is busy with {self.limit} requests; try again.", headers=RETRY_AFTER)
        self.num_live += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_live -= 1
            if self.num_live == 0:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Return when no request is live."""
        await self._idle.wait()
