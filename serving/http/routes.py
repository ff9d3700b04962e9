"""`Route`: one endpoint, as the app serves it and as the OpenAPI document describes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from pydantic import BaseModel

from serving.http.errors import Fault

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class FaultForm:
    """How an API shows faults, if not as OpenAI's does.

    Attributes:
        schema: of the body.
        body: makes it.
    """

    schema: type[BaseModel]
    body: Callable[[Fault], bytes]


@dataclass(frozen=True)
class Route:
    """One endpoint.

    Attributes:
        method, path: as aiohttp writes them (`/requests/{request_id}/timeline`).
        handler: answers; faults are raised and become the error body in one place.
        summary: one line.
        request, response: schemas of the JSON bodies; None where there is none.
        streams: True if it may answer with server-sent events.
        open: True if it needs no API key.
        faults: how faults are shown; None = as OpenAI's API does.
        event: schema of the JSON in each server-sent event; None where events have several forms, or there are none.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    request: type[BaseModel] | None = None
    response: type[BaseModel] | None = None
    streams: bool = False
    open: bool = False
    event: type[BaseModel] | None = None
    faults: FaultForm | None = None
