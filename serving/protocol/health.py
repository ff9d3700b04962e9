"""Bodies of `/health`, `/version` and `/load`."""

from __future__ import annotations

from serving.protocol.base import ResponseBody


class Health(ResponseBody):
    """`status` is "ok"; anything else is answered as an error."""

    status: str


class Version(ResponseBody):
    """The version of Quire."""

    version: str


class Load(ResponseBody):
    """Requests that are being worked on."""

    server_load: int
