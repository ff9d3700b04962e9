"""`ServerContext`: what every endpoint may use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from aiohttp import web

from engine.client import EngineClient
from engine.errors import InvalidRequestError
from serving.http.errors import ApiError
from serving.http.observer import Observer
from serving.http.parsers import ParserFactory, make_factory
from serving.http.renderer import ChatRenderer
from serving.http.settings import ServerSettings
from serving.http.traffic import Traffic

SHORT_TEXT = 2000  # characters that are encoded at once: a hop to a thread would take longer


@dataclass(frozen=True)
class ServerContext:
    """Lives as long as the app.

    Attributes:
        client: the engine.
        settings: of the server.
        renderer: of conversations.
        parsers: make the parsers of chat answers.
        observers: told of every request.
        pool: threads that encode long texts.
        traffic: what is going on now.
        created: UNIX time of the start, seconds.
    """

    client: EngineClient
    settings: ServerSettings
    renderer: ChatRenderer
    parsers: ParserFactory
    observers: tuple[Observer, ...] = ()
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "quire-tokenizer"))
    traffic: Traffic = field(default_factory=Traffic)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_names(self) -> Sequence[str]:
        """The names that requests may use; the first is used in answers."""
        return model_names(self.client, self.settings)

    def check_model(self, name: str | None) -> str:
        """The name to answer with.

        Raises:
            ApiError: there is no such model.
        """
        if not name:
            return self.model_names[0]
        if name not in self.model_names:
            valid = ", ".join(f"`{known}`" for known in self.model_names)
            raise ApiError(404, f"The model `{name}` does not exist. Valid names: {valid}.", "model", "model_not_found")
        return name

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, without holding up the event loop.

        Raises:
            InvalidRequestError: there is no tokenizer, or the text is not valid Unicode.
        """
        tokenizer = self.client.tokenizer
        if tokenizer is None:
            raise InvalidRequestError(
                "a text needs a tokenizer; this engine has none (skip_tokenizer_init): pass token ids.", "prompt"
            )
        if len(text) <= SHORT_TEXT:
            return tokenizer.encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, tokenizer.encode, text, add_special_tokens)


def model_names(client: EngineClient, settings: ServerSettings) -> Sequence[str]:
    """The names that a model is served under."""
    return settings.served_model_name or [client.info.model]


CONTEXT = web.AppKey("context", ServerContext)


def context_of(request: web.Request) -> ServerContext:
    """The context of the app that serves a request."""
    return request.app[CONTEXT]


def make_context(
    client: EngineClient,
    settings: ServerSettings,
    *,
    observers: Sequence[Observer] = (),
    chat_template: str | None = None,
) -> ServerContext:
    """The context of a server.

    Args:
        chat_template: source of a template to use instead of the model's.
    """
    return ServerContext(
        client=client,
        settings=settings,
        renderer=ChatRenderer(client.tokenizer, chat_template),
        parsers=make_factory(settings.tool_call_parser, settings.reasoning_parser),
        observers=tuple(observers),
        traffic=Traffic(settings.max_concurrent_requests),
    )
