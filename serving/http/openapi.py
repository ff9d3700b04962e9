"""`/openapi.json`, made from the routes and their pydantic models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.http.routes import Route
from serving.protocol.base import ErrorBody
from serving.version import package_version

PATH = "/openapi.json"
_REF = "#/components/schemas/{model}"
_VARIABLE = re.compile(r"\{(\w+)(?::[^}]*)?\}")
_Mode = Literal["validation", "serialization"]


def openapi_route(routes: Sequence[Route], root_path: str = "") -> Route:
    """The route that describes `routes` and itself. The document is made once."""

    async def openapi(_: web.Request) -> web.Response:
        return web.Response(body=data, content_type="application/json")

    route = Route("GET", PATH, openapi, "This document.", open=True)
    data = msgspec.json.encode(document([*routes, route], root_path))
    return route


def document(routes: Iterable[Route], root_path: str = "") -> dict[str, Any]:
    """The OpenAPI 3.1 document of `routes`.

    Args:
        root_path: what a proxy in front puts before each path.
    """
    routes = list(routes)
    wanted: dict[tuple[type[BaseModel], _Mode], None] = {(ErrorBody, "serialization"): None}
    for route in routes:
        if route.request is not None:
            wanted[route.request, "validation"] = None
        for body in (route.response, route.event, None if route.faults is None else route.faults.schema):
            if body is not None:
                wanted[body, "serialization"] = None
    refs, definitions = models_json_schema(list(wanted), ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = _VARIABLE.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, refs)
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Quire", "version": package_version(), "description": "An OpenAI-compatible server."},
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    if root_path:
        made["servers"] = [{"url": root_path}]
    return made


def _operation(route: Route, refs: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    fault_schema = refs[ErrorBody if route.faults is None else route.faults.schema, "serialization"]
    fault = {"description": "A fault.", "content": {"application/json": {"schema": fault_schema}}}
    answer: dict[str, Any] = {}
    if route.response is not None:
        answer["application/json"] = {"schema": refs[route.response, "serialization"]}
    if route.streams:
        answer["text/event-stream"] = {"schema": {"type": "string"}}
        if route.event is not None:  # OpenAPI 3.1 has no words for the events inside a stream
            answer["text/event-stream"]["x-event-schema"] = refs[route.event, "serialization"]
    operation: dict[str, Any] = {
        "summary": route.summary,
        "responses": {
            "200": {"description": "Done.", **({"content": answer} if answer else {})},
            "4XX": fault,
            "5XX": fault,
        },
    }
    if not route.open:
        operation["security"] = [{"key": []}]
    if names := _VARIABLE.findall(route.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if route.request is not None:
        schema = refs[route.request, "validation"]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
