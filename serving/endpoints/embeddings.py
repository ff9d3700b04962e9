"""`/v1/embeddings`."""

from __future__ import annotations

import base64
import sys
import time
from array import array
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from engine.errors import InvalidRequestError
from serving.endpoints.prompts import engine_prompt, several_prompts
from serving.http.body import read_body
from serving.http.context import ServerContext, context_of
from serving.http.generation import EmbeddingJob, embeddings, make_request_id
from serving.http.reply import reply
from serving.http.routes import Route
from serving.protocol.embeddings import EmbeddingRequest, EmbeddingResponse

PATH = "/v1/embeddings"


async def create(request: web.Request) -> web.StreamResponse:
    """`POST /v1/embeddings`."""
    context = context_of(request)
    body = await read_body(request, context, EmbeddingRequest)
    body.check_missing()
    _check_dimensions(context, body)
    model = context.check_model(body.model)
    request_id = make_request_id(request, body.request_id, "embd-")
    prompts = [
        await engine_prompt(context, body, given, add_special_tokens=body.add_special_tokens)
        for given in several_prompts(body.input, "input")
    ]
    jobs = [
        EmbeddingJob(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{number}",
            endpoint=PATH,
            model=model,
            prompt=prompt,
            pooling=body.pooling,
            normalize=body.normalize,
            trace_parent=request.headers.get("traceparent"),
        )
        for number, prompt in enumerate(prompts)
    ]
    outputs = await embeddings(context, jobs)
    num_tokens = sum(output.num_prompt_tokens for output in outputs)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(output.embedding, body.encoding_format)}
        for index, output in enumerate(outputs)
    ]
    answer: dict[str, Any] = {
        "object": "list",
        "id": request_id,
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return reply(answer)


def _check_dimensions(context: ServerContext, body: EmbeddingRequest) -> None:
    """Raises:
    InvalidRequestError: another size than the model's is asked for.
    """
    size = context.client.info.embedding_size
    if body.dimensions is not None and body.dimensions != size:
        raise InvalidRequestError(
            f"dimensions must be {size} or left out: embeddings of this model cannot be shortened; "
            f"got {body.dimensions}.",
            "dimensions",
        )


def _encoded(vector: Sequence[float], form: str) -> list[float] | str:
    """The numbers, or the base64 text of their float32 bytes."""
    if form == "float":
        return list(vector)
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


ROUTES = (Route("POST", PATH, create, "Vectors of texts.", request=EmbeddingRequest, response=EmbeddingResponse),)
