"""Reading a request's JSON body, within limits of size, time and depth."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web
from pydantic import BaseModel

from serving.http.context import ServerContext
from serving.http.errors import ApiError

MAX_DEPTH = 64  # of nested JSON: deeper ones only attack parsers, schemas and templates


async def read_body[Body: BaseModel](request: web.Request, context: ServerContext, kind: type[Body]) -> Body:
    """The request's body, parsed and checked.

    Raises:
        ApiError: not JSON by its header or by its content, too large, too deep, or too slow to arrive.
        ValidationError: it is JSON of another form.
    """
    if request.content_type != "application/json":
        raise ApiError(
            400, f"Unsupported Media Type: Content-Type must be application/json, got {request.content_type!r}."
        )
    return kind.model_validate(parse_json(await _read(request, context)))


async def _read(request: web.Request, context: ServerContext) -> bytes:
    limit = context.settings.max_request_bytes
    too_large = ApiError(413, f"The request's body is too large: at most {limit} bytes are allowed.")
    if request.content_length is not None and request.content_length > limit:
        raise too_large
    try:
        async with asyncio.timeout(context.settings.receive_timeout):
            return await request.read()
    except TimeoutError:
        seconds = context.settings.receive_timeout
        raise ApiError(408, f"The request's body did not arrive within {seconds:g} seconds.") from None
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, no trailing text.

    Raises:
        ApiError: it is not, or it is nested more than `MAX_DEPTH` deep.
    """
    if _depth(data) > MAX_DEPTH:
        raise ApiError(400, f"The JSON is nested too deeply: at most {MAX_DEPTH} levels are allowed.")
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from None


def _depth(data: bytes) -> int:
    """An upper bound of the depth, at the speed of `bytes.count` for usual bodies; brackets in texts only count where
    there are many of them.
    """
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return 0
    depth = deepest = 0
    in_text = False
    escaped = False
    for byte in data:
        if in_text:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_text = False
        elif byte == 0x22:
            in_text = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest
