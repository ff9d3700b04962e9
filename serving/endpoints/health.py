"""`/health`, `/ping`, `/version`, `/load`: for load balancers and people."""

from __future__ import annotations

from aiohttp import web

from serving.http.context import context_of
from serving.http.errors import RETRY_AFTER, ApiError
from serving.http.reply import reply
from serving.http.routes import Route
from serving.protocol.health import Health, Load, Version
from serving.version import package_version


async def health(request: web.Request) -> web.Response:
    """200 if a token can be made now, else 503."""
    context = context_of(request)
    if context.traffic.draining:
        raise ApiError(503, "The server is shutting down.", headers=RETRY_AFTER)
    await context.client.check_health()
    return reply(Health(status="ok"))


async def version(request: web.Request) -> web.Response:
    """The version of Quire."""
    return reply(Version(version=package_version()))


async def load(request: web.Request) -> web.Response:
    """How many requests are being worked on."""
    return reply(Load(server_load=context_of(request).traffic.num_live))


ROUTES = (
    Route("GET", "/health", health, "200 if a token can be made now, else 503.", response=Health, open=True),
    Route("GET", "/ping", health, "As /health.", response=Health, open=True),
    Route("POST", "/ping", health, "As /health.", response=Health, open=True),
    Route("GET", "/version", version, "The version of Quire.", response=Version, open=True),
    Route("GET", "/load", load, "Requests that are being worked on.", response=Load, open=True),
)
