"""Reading a request's JSON body, within limits of size, time and depth."""

from __future__ import annotations

import asyncio
import re
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
    if is_too_deep(data):
        raise ApiError(400, f"The JSON is nested too deeply: at most {MAX_DEPTH} levels are allowed.")
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from None


_ESCAPES = re.compile(rb"\\.", re.DOTALL)
_TEXTS = re.compile(rb'"[^"]*"')
_ALL_BUT_BRACKETS = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_ONE_KIND = bytes.maketrans(b"{}", b"[]")


def is_too_deep(data: bytes) -> bool:
    """True if JSON is nested more than `MAX_DEPTH` deep. All of it at the speed of C: a body may have megabytes.

    What is not JSON is not too deep: the parser, whose own recursion is bounded, says what is wrong with it.
    """
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    bare = data if b"\\" not in data else _ESCAPES.sub(b"", data)
    bare = _TEXTS.sub(b"", bare.translate(_ONE_KIND, _ALL_BUT_BRACKETS))
    for _ in range(MAX_DEPTH):
        outer = bare.replace(b"[]", b"")  # without the innermost level
        if len(outer) == len(bare):
            return False  # all is gone, or the brackets do not match
        bare = outer
    return bool(bare)
