"""`Metrics`: everything that `GET /metrics` shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aiohttp import web
from prometheus_client import ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from engine.client import EngineClient
from engine.errors import EngineDeadError
from serving.http.routes import Route
from serving.metrics.engine import engine_families
from serving.metrics.http import HttpMetrics
from serving.metrics.requests import RequestMetrics

ENGINE = "0"  # vLLM numbers its engines; there is one


class _Families:
    """What prometheus_client encodes: anything with `collect`."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


class Metrics:
    """The metrics of one server. Hold none of prometheus_client's global registry: two servers in one process do not
    mix.

    Args:
        client: the engine.
        model_name: the name that the model is served under.
    """

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self.requests = RequestMetrics(client.info.max_model_len)
        self.http = HttpMetrics()
        self._client = client
        self._labels = {"model_name": model_name, "engine": ENGINE}
        self._process = ProcessCollector(registry=None)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The text, and its content type.

        Args:
            accept: the header; OpenMetrics if it asks for it, else Prometheus' text format.
        """
        encode, content_type = choose_encoder(accept)
        return encode(_Families(await self._collect())), content_type

    async def _collect(self) -> list[Metric]:
        up = GaugeMetricFamily("quire:engine_up", "1 while the engine answers.", labels=list(self._labels))
        try:
            snapshot = await self._client.snapshot()
        except EngineDeadError:
            snapshot = None
        up.add_metric(list(self._labels.values()), 0 if snapshot is None else 1)
        return [up, *self._rest(snapshot)]

    def _rest(self, snapshot: dict[str, Any] | None) -> Iterator[Metric]:
        if snapshot is not None:
            yield from engine_families(snapshot, self._client.info, self._labels)
        yield from self.requests.families(self._labels)
        yield from self.http.families()
        yield from self._process.collect()

    async def _answer(self, request: web.Request) -> web.Response:
        body, content_type = await self.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    @property
    def route(self) -> Route:
        """`GET /metrics`. Open, as Prometheus expects it."""
        return Route("GET", "/metrics", self._answer, "Metrics in Prometheus' text format", open=True)
