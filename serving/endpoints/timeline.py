"""`GET /requests/{request_id}/timeline`: what happened to one request, live or lately ended."""

from __future__ import annotations

from aiohttp import web

from engine.client import EngineClient
from serving.http.errors import ApiError
from serving.http.routes import Route
from serving.protocol.timeline import Timeline


def timeline_route(client: EngineClient) -> Route:
    """The endpoint of an engine's timelines."""

    async def answer(request: web.Request) -> web.Response:
        name = request.match_info["request_id"]
        found = await client.timeline(name)
        if found is None:
            raise ApiError(404, f"The request `{name}` is not known (any more).", "request_id")
        return web.json_response(text=Timeline.of(found).model_dump_json())

    return Route("GET", "/requests/{request_id}/timeline", answer, "What happened to a request", response=Timeline)
