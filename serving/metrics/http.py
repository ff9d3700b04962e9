"""HTTP requests by endpoint, method and status: a middleware that counts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client.core import CounterMetricFamily, Metric

CLIENT_LEFT = 499  # no such status in HTTP; nginx's for a client that closed the connection
UNKNOWN = "unmatched"  # one label for all paths that are no endpoint: a client must not invent labels


class HttpMetrics:
    """Counts answers."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, str, str]] = Counter()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count what the handler answers. To be the outermost middleware, so that it sees error bodies too."""
        status = 500
        try:
            response = await handler(request)
            status = response.status
            return response
        except web.HTTPException as error:
            status = error.status
            raise
        except (asyncio.CancelledError, ConnectionResetError):
            status = CLIENT_LEFT
            raise
        finally:
            resource = request.match_info.route.resource
            path = UNKNOWN if resource is None else resource.canonical
            method = request.method if resource is not None else "any"
            self._answers[path, method, str(status)] += 1

    def families(self) -> Iterator[Metric]:
        """One counter."""
        family = CounterMetricFamily(
            "http_requests", "HTTP requests by endpoint, method and status.", labels=["handler", "method", "status"]
        )
        for key, count in self._answers.items():
            family.add_metric(key, count)
        yield family
