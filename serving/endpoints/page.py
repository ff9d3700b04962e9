"""`GET /`: the page on which a person chats with the model and watches the engine. One file, `serving/page/index.html`.

The page may load and reach nothing but this server: its policy names the one script and the one style by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from aiohttp import web

from serving.http.routes import Route

FILE = Path(__file__).resolve().parents[1] / "page" / "index.html"


@dataclass(frozen=True)
class Page:
    """The page, ready to send.

    Attributes:
        body: HTML, UTF-8.
        etag: changes with the body.
        policy: value of the Content-Security-Policy header.
    """

    body: bytes
    etag: str
    policy: str


@cache
def load_page() -> Page:
    """Read the page, once."""
    text = FILE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(text, "script"),
        "style-src": _hashes(text, "style"),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    body = text.encode()
    return Page(
        body, hashlib.sha256(body).hexdigest()[:32], "; ".join(f"{name} {value}" for name, value in policy.items())
    )


def _hashes(text: str, tag: str) -> str:
    """The sources that allow exactly the elements of this kind that are in the page."""
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


async def page(request: web.Request) -> web.Response:
    """Answer with the page, or 304 if the browser has it."""
    found = load_page()
    headers = {
        "Cache-Control": "no-cache",  # ask each time whether it changed
        "Content-Security-Policy": found.policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    known = {tag.value for tag in request.if_none_match or ()}
    response = (
        web.Response(status=304, headers=headers)
        if known & {found.etag, "*"}
        else web.Response(body=found.body, content_type="text/html", charset="utf-8", headers=headers)
    )
    response.etag = found.etag
    return response


ROUTES = (Route("GET", "/", page, "A page to chat with the model and to watch the engine.", open=True),)
