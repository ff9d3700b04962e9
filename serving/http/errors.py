"""From faults to answers: one table, one body."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web
from pydantic import ValidationError

from engine.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    QuireError,
    RequestFailedError,
)

MAX_FAULTS = 10  # of a body that are listed
MAX_INPUT_CHARS = 200  # of a wrong value that are shown
MAX_MESSAGE_CHARS = 4000
CLIENT_GONE = 499  # nginx's number: nobody reads the answer; for logs and metrics only

STATUS_TYPES: Mapping[int, str] = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    411: "BadRequestError",
    413: "RequestTooLargeError",
    415: "BadRequestError",
    422: "UnprocessableEntityError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


@dataclass(eq=False)
class ApiError(QuireError):
    """A fault that HTTP alone knows.

    Attributes:
        status, message, param, code: of the answer.
        headers: more headers of the answer.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Fault:
    """What a client is told.

    Attributes:
        status: of the answer.
        error: the `error` object of the body.
        headers: more headers.
    """

    status: int
    error: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """What was wrong."""
        return self.error["message"]

    def body(self) -> bytes:
        """The JSON body."""
        return msgspec.json.encode({"error": self.error})

    def event(self) -> bytes:
        """The event that ends a stream that had begun."""
        return b"data: " + self.body() + b"\n\n"


# Most special first. A fault that is not here is one of ours: 500, its text in the log only.
TABLE: tuple[tuple[type[BaseException], int], ...] = (
    (ContextLengthError, 400),
    (InvalidRequestError, 400),
    (QueueFullError, 503),
    (EngineDeadError, 503),
    (RequestFailedError, 500),
    (TimeoutError, 504),
)
RETRY_AFTER = {"Retry-After": "1"}


def fault_of(error: BaseException) -> Fault:
    """The answer to a fault."""
    if isinstance(error, ApiError):
        return _fault(error.status, error.message, error.param, error.code, error.headers)
    if isinstance(error, ValidationError):
        return _validation_fault(error)
    if isinstance(error, web.HTTPException):
        return _fault(error.status, error.reason or "", headers=_allow_header(error))
    for kind, status in TABLE:
        if isinstance(error, kind):
            message = "The request took longer than the server allows." if kind is TimeoutError else str(error)
            parameter, code = (error.parameter, error.code) if isinstance(error, InvalidRequestError) else (None, None)
            return _fault(status, message, parameter, code, RETRY_AFTER if status == 503 else {})
    return _fault(500, "Internal server error: see the server's log.")


def is_known(error: BaseException) -> bool:
    """True if a fault is a client's or a listed one; others are logged with their traceback."""
    return isinstance(error, (ApiError, ValidationError, web.HTTPException, *(kind for kind, _ in TABLE)))


def _fault(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Fault:
    text = hide_paths(message)
    if len(text) > MAX_MESSAGE_CHARS:
        text = text[:MAX_MESSAGE_CHARS] + "…"
    kind = STATUS_TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    # A lone surrogate that came in by an escape could not go out as UTF-8.
    text = text.encode("utf-8", "replace").decode("utf-8")
    error = {"message": text, "type": kind, "param": param, "code": code if code is not None else status}
    return Fault(status, error, headers or {})


def _allow_header(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}


# An absolute path of at least two parts whose first is a usual root; routes of the API are none of these.
_PATHS = re.compile(
    r"(?<![\w:/.])/(?:root|home|usr|tmp|var|opt|etc|mnt|srv|data|proc|dev|run|Users|work)/[^\s'\",;:)\]]+"
)


def hide_paths(message: str) -> str:
    """A message without paths of the server's file system."""
    return _PATHS.sub("<path>", message)


def _validation_fault(error: ValidationError) -> Fault:
    """The first faults of a body, one line each."""
    faults = error.errors(include_url=False, include_context=False)
    lines = [_describe(fault) for fault in faults[:MAX_FAULTS]]
    if len(faults) > MAX_FAULTS:
        lines.append(f"… and {len(faults) - MAX_FAULTS} more.")
    first = faults[0]["loc"]
    return _fault(400, "\n".join(lines), str(first[0]) if first else None)


def _describe(fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"]) or "body"
    if fault["type"] == "missing":
        return f"{place}: {fault['msg']}"
    shown = repr(fault["input"])
    if len(shown) > MAX_INPUT_CHARS:
        shown = shown[:MAX_INPUT_CHARS] + "…"
    return f"{place}: {fault['msg']}, got {shown}"


def json_response(fault: Fault, body: bytes | None = None) -> web.Response:
    """The whole answer to a fault; with another body where the API is not OpenAI's."""
    return web.Response(
        body=fault.body() if body is None else body,
        status=fault.status,
        content_type="application/json",
        headers=dict(fault.headers),
    )


def is_disconnect(error: BaseException) -> bool:
    """True if the client has gone."""
    return isinstance(error, (ConnectionError, asyncio.CancelledError))
