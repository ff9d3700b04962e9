"""`/v1/models`: the names that the model is served under."""

from __future__ import annotations

from aiohttp import web

from serving.http.context import ServerContext, context_of
from serving.http.reply import reply
from serving.http.routes import Route
from serving.protocol.models import ModelCard, ModelList


def _card(context: ServerContext, name: str) -> ModelCard:
    info = context.client.info
    return ModelCard(id=name, created=context.created, root=context.model_names[0], max_model_len=info.max_model_len)


async def list_models(request: web.Request) -> web.Response:
    """`GET /v1/models`."""
    context = context_of(request)
    return reply(ModelList(data=[_card(context, name) for name in context.model_names]))


async def get_model(request: web.Request) -> web.Response:
    """`GET /v1/models/{id}`. Names may have slashes."""
    context = context_of(request)
    return reply(_card(context, context.check_model(request.match_info["id"])))


ROUTES = (
    Route("GET", "/v1/models", list_models, "The names of the model.", response=ModelList),
    Route("GET", "/v1/models/{id:.+}", get_model, "One name of the model.", response=ModelCard),
)
