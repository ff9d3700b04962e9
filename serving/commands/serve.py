"""`quire serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web

from engine.client import EngineClient
from engine.config import EngineConfig
from serving.backend import ClientFactory
from serving.endpoints import ALL_ROUTES
from serving.errors import EXIT_OK, UsageError
from serving.flags import add_engine_flags, add_server_flags, engine_settings, server_settings
from serving.http.app import make_app
from serving.http.context import make_context, model_names
from serving.http.parsers import make_factory
from serving.http.routes import Route
from serving.http.server import run_server
from serving.http.settings import ServerSettings
from serving.observability import Observability, ObservabilityConfig, observe

SUMMARY = "serve a model over HTTP, as OpenAI's API"


def set_up(parser: argparse.ArgumentParser, create: ClientFactory) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS] [MODEL]"
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as --model")
    add_server_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=functools.partial(run, create=create))


def run(args: argparse.Namespace, create: ClientFactory) -> int:
    """Load the model, serve until a signal, and return the exit code.

    Raises:
        QuireError: a flag is wrong, the model cannot be loaded, or the address cannot be used.
    """
    # All this is checked before jax and the model are loaded, so that a wrong flag is answered at once.
    settings = ServerSettings(**server_settings(args))
    make_factory(settings.tool_call_parser, settings.reasoning_parser)
    observability_of(settings)
    template = read_template(settings.chat_template)
    flat = engine_settings(args)
    if args.model is not None:
        if flat.get("model", args.model) != args.model:
            raise UsageError(f"MODEL is {args.model} and --model is {flat['model']}: give one of them.")
        flat["model"] = args.model
    model = EngineConfig.from_flat(**flat).load.model
    flat.pop("model", None)
    flat.setdefault("compile_in_background", True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(model, settings, flat, create, template))
    return EXIT_OK


async def serve(
    model: str, settings: ServerSettings, engine: dict[str, Any], create: ClientFactory, template: str | None
) -> None:
    """Make the engine, serve until a signal, close the engine.

    Args:
        model, engine: reference and flat settings of the engine.
        settings: of the server.
        create: makes the engine.
        template: source of a chat template to use instead of the model's.
    """
    client = await create(model, process=settings.engine_process, **engine)
    try:
        served = compose(client, settings, template)
        try:
            await run_server(served.app, lambda url: announce(url, client, served.names, served.routes))
        finally:
            await asyncio.to_thread(served.watching.close)
    finally:
        await client.close()


@dataclass(frozen=True)
class Served:
    """A server that does not listen yet.

    Attributes:
        names: of the model.
        watching: to be closed when the server has stopped.
    """

    app: web.Application
    routes: Sequence[Route]
    names: Sequence[str]
    watching: Observability


def compose(client: EngineClient, settings: ServerSettings, template: str | None = None) -> Served:
    """Put the app of an engine together: endpoints, and what watches them.

    Raises:
        UsageError, ConfigError: a setting is wrong.
    """
    names = model_names(client, settings)
    watching = observe(client, names[0], observability_of(settings))
    context = make_context(client, settings, observers=watching.observers, chat_template=template)
    routes = (*ALL_ROUTES, *watching.routes)
    return Served(make_app(context, routes, [watching.metrics.http.middleware]), routes, names, watching)


def observability_of(settings: ServerSettings) -> ObservabilityConfig:
    """How the server watches itself.

    Raises:
        UsageError: a value is not one of those that are allowed.
    """
    return ObservabilityConfig(
        log_format="json" if settings.log_format == "json" else "text",
        log_requests=settings.request_log,
        otlp_traces_endpoint=settings.otlp_traces_endpoint,
    )


def read_template(path: str | None) -> str | None:
    """The source of a chat template.

    Raises:
        UsageError: the file cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the chat template {path}: {error}") from error


def announce(url: str, client: EngineClient, names: Sequence[str], routes: Sequence[Route]) -> None:
    """Say on stderr what is served where, and on stdout, for programs, the same in one line of JSON."""
    info = client.info
    lines = [
        f"Serving {', '.join(names)} on {url}",
        f"  {info.max_model_len} tokens of context, {info.max_num_seqs} sequences at a time, "
        f"{info.num_kv_blocks * info.block_size} tokens of KV cache",
        *(f"  {route.method:<6} {route.path}  {route.summary}" for route in routes),
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
    print(json.dumps({"url": url, "models": list(names)}), flush=True)
