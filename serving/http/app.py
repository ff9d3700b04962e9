"""The app: routes, and the one gate that every request passes."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterable, Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.config import Environment
from engine.errors import QueueFullError
from serving.http.context import CONTEXT, ServerContext, context_of
from serving.http.errors import ApiError, fault_of, is_known, json_response
from serving.http.openapi import openapi_route
from serving.http.routes import Route

logger = logging.getLogger("quire.serving")

CORS_HEADERS = "Authorization, Content-Type, X-Api-Key, X-Request-Id, Anthropic-Version"


def make_app(
    context: ServerContext, routes: Sequence[Route], middlewares: Sequence[Middleware] = ()
) -> web.Application:
    """The app that serves `routes` and the document that describes them.

    Args:
        middlewares: around everything, so that they see each answer as the client gets it; the outermost first.
    """
    settings = context.settings
    routes = [*routes, openapi_route(routes, settings.root_path)]
    gate = Gate(routes, settings.api_key or Environment.read().api_keys, settings.allowed_origins or ())
    app = web.Application(middlewares=[*middlewares, gate.pass_through], client_max_size=settings.max_request_bytes)
    app[CONTEXT] = context
    app.on_response_prepare.append(gate.add_headers)
    for route in routes:
        app.router.add_route(route.method, route.path, route.handler)
        if route.method == "GET":
            app.router.add_route("HEAD", route.path, route.handler)

    async def close_pool(_: web.Application) -> None:
        context.pool.shutdown(wait=False, cancel_futures=True)

    app.on_cleanup.append(close_pool)
    return app


class Gate:
    """Keys, origins, limits; and faults become answers."""

    def __init__(self, routes: Iterable[Route], keys: Sequence[str], origins: Sequence[str]) -> None:
        routes = list(routes)
        self._open_paths = {route.path for route in routes if route.open}
        self._fault_forms = {route.path: route.faults for route in routes if route.faults is not None}
        self._keys = [key.encode() for key in keys]
        self._origins = frozenset(origins)

    @property
    def pass_through(self) -> Middleware:
        """The middleware."""

        @web.middleware
        async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                if self._is_preflight(request):
                    return web.Response(status=204)
                self._check_key(request)
                if request.method != "POST":
                    return await handler(request)
                with context_of(request).traffic.admit():
                    return await handler(request)
            except Exception as error:
                return self._answer_fault(request, error)

        return gate

    def _answer_fault(self, request: web.Request, error: Exception) -> web.Response:
        if isinstance(error, web.HTTPNotFound):
            error = ApiError(404, f"There is no {request.path} here: GET /openapi.json lists what there is.")
        elif isinstance(error, web.HTTPMethodNotAllowed):
            allowed = ", ".join(sorted(error.allowed_methods))
            error = ApiError(405, f"{request.path} takes {allowed}, not {request.method}.", headers={"Allow": allowed})
        if not is_known(error):
            logger.error("%s %s failed", request.method, request.path, exc_info=error)
        fault = fault_of(error)
        if request.method == "POST" and _is_refusal(error, fault.status):
            for observer in context_of(request).observers:
                observer.on_rejected(_endpoint(request), fault.status, fault.message)
        form = self._fault_forms.get(request.path)
        return json_response(fault, None if form is None else form.body(fault))

    # keys

    def _check_key(self, request: web.Request) -> None:
        """Compare in constant time, with every key.

        Raises:
            ApiError: there are keys, and the request has none of them.
        """
        if not self._keys or request.path in self._open_paths or not request.path.startswith("/v1/"):
            return
        given = _key_of(request).encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if not any(matches):
            raise ApiError(
                401,
                "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    # origins

    def _is_preflight(self, request: web.Request) -> bool:
        return (
            request.method == "OPTIONS"
            and "Access-Control-Request-Method" in request.headers
            and self._allowed_origin(request) is not None
        )

    def _allowed_origin(self, request: web.BaseRequest) -> str | None:
        origin = request.headers.get("Origin")
        if origin is None or not self._origins:
            return None
        if "*" in self._origins:
            return "*"
        return origin if origin in self._origins else None

    async def add_headers(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Headers of every answer: the id that the client gave, and what browsers ask for."""
        response.headers["Server"] = "quire"
        if (given := request.headers.get("X-Request-Id")) is not None and given.isprintable():
            response.headers["X-Request-Id"] = given
        if (origin := self._allowed_origin(request)) is None:
            return
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Vary"] = "Origin"
        if request.method == "OPTIONS":
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, OPTIONS"
            response.headers["Access-Control-Allow-Headers"] = CORS_HEADERS
            response.headers["Access-Control-Max-Age"] = "600"


def _key_of(request: web.Request) -> str:
    """The key that a request brings: as a bearer token, or as Anthropic's clients send it."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")


def _is_refusal(error: Exception, status: int) -> bool:
    """True for a fault of a request that was never accepted; one that was accepted has its own end."""
    return status < 500 or isinstance(error, (QueueFullError, ApiError))


def _endpoint(request: web.Request) -> str:
    """The path of the route, never the client's own: there are few of those."""
    resource = request.match_info.route.resource
    return "unknown" if resource is None else resource.canonical
