"""JSON answers."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web
from pydantic import BaseModel


def reply(body: BaseModel | dict[str, Any], status: int = 200) -> web.Response:
    """An answer of a body: a response model, or the same as plain values."""
    data = body.model_dump_json().encode() if isinstance(body, BaseModel) else msgspec.json.encode(body)
    return web.Response(body=data, status=status, content_type="application/json")
