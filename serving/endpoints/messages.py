"""`/v1/messages`: Anthropic's API, translated to the chat endpoint. One way to the engine for both."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web
from pydantic_core import from_json

from engine.outputs import CompletionOutput, RequestOutput
from serving.endpoints.blocks import Block, BlockEvent, Blocks
from serving.endpoints.chat import PreparedChat, prepare_chat
from serving.endpoints.messages_input import chat_request
from serving.http.body import read_body
from serving.http.context import context_of
from serving.http.errors import Fault
from serving.http.generation import final_output, generate, require_whole
from serving.http.reply import reply
from serving.http.routes import FaultForm, Route
from serving.http.sse import send_events
from serving.parsing.deltas import ReasoningDelta
from serving.protocol.messages import CountResponse, MessagesError, MessagesInput, MessagesRequest, MessagesResponse

PATH = "/v1/messages"
PREFIX = "msg_"

# Anthropic's types by status; others are invalid_request_error below 500 and api_error above.
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(fault: Fault) -> bytes:
    """A fault as Anthropic's clients read it."""
    kind = ERROR_TYPES.get(fault.status, "invalid_request_error" if fault.status < 500 else "api_error")
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": fault.message}})


async def create(request: web.Request) -> web.StreamResponse:
    """`POST /v1/messages`."""
    context = context_of(request)
    body = await read_body(request, context, MessagesRequest)
    chat = await prepare_chat(request, context, chat_request(body), endpoint=PATH, prefix=PREFIX)
    answer = MessageAnswer(chat)
    if body.stream:
        events = answer.events(generate(context, chat.job))
        return await send_events(request, events, fault_event=lambda fault: _event("error", error_body(fault)))
    return reply(answer.response(await final_output(context, chat.job)))


async def count_tokens(request: web.Request) -> web.StreamResponse:
    """`POST /v1/messages/count_tokens`."""
    context = context_of(request)
    body = await read_body(request, context, MessagesInput)
    chat = await prepare_chat(request, context, chat_request(body), endpoint=PATH, prefix=PREFIX)
    prompt = chat.job.prompt
    assert isinstance(prompt, dict)
    return reply({"input_tokens": len(prompt["prompt_token_ids"])})


class MessageAnswer:
    """Forms what the engine gives into the API's JSON, for one HTTP request."""

    def __init__(self, chat: PreparedChat) -> None:
        self._chat = chat
        self._parser = chat.make_parser()
        self._blocks = Blocks()
        self._shows_reasoning = chat.body.include_reasoning

    def response(self, output: RequestOutput) -> dict[str, Any]:
        """The whole answer.

        Raises:
            ApiError: it was aborted.
        """
        [completion] = output.outputs
        require_whole(completion)
        self._feed(completion)
        return {
            **self._envelope(output, len(completion.token_ids)),
            "content": [_content(block, complete=True) for block in self._blocks.blocks],
            **self._stop(completion),
        }

    async def events(self, outputs: AsyncGenerator[RequestOutput]) -> AsyncGenerator[bytes]:
        """The answer as a stream."""
        begun, num_tokens = False, 0
        async with aclosing(outputs):
            async for output in outputs:
                [completion] = output.outputs
                num_tokens += len(completion.token_ids)
                if not begun:
                    begun = True
                    message = self._envelope(output, num_tokens) | {"content": [], **self._stop(None)}
                    yield _json_event("message_start", message=message)
                    yield _json_event("ping")
                require_whole(completion)
                for event in self._feed(completion):
                    yield _block_event(event)
                if completion.finished:
                    delta, usage = self._stop(completion), _usage(output, num_tokens)
                    yield _json_event("message_delta", delta=delta, usage=usage)
                    yield _json_event("message_stop")

    def _feed(self, completion: CompletionOutput) -> Sequence[BlockEvent]:
        deltas = self._parser.feed(completion.text)
        if completion.finished:
            deltas = [*deltas, *self._parser.finish()]
        if not self._shows_reasoning:
            deltas = [delta for delta in deltas if not isinstance(delta, ReasoningDelta)]
        events = self._blocks.feed(deltas)
        return [*events, *self._blocks.finish()] if completion.finished else events

    def _envelope(self, output: RequestOutput, num_tokens: int) -> dict[str, Any]:
        job = self._chat.job
        return {
            "id": job.request_id,
            "type": "message",
            "role": "assistant",
            "model": job.model,
            "usage": _usage(output, num_tokens),
        }

    def _stop(self, completion: CompletionOutput | None) -> dict[str, Any]:
        """Why it ended; null while it runs."""
        if completion is None:
            return {"stop_reason": None, "stop_sequence": None}
        if completion.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if isinstance(completion.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop_reason}
        return {"stop_reason": "tool_use" if self._blocks.has_calls else "end_turn", "stop_sequence": None}


def _usage(output: RequestOutput, num_tokens: int) -> dict[str, int]:
    cached = output.num_cached_tokens
    return {
        "input_tokens": len(output.prompt_token_ids) - cached,
        "output_tokens": num_tokens,
        "cache_read_input_tokens": cached,
    }


def _content(block: Block, *, complete: bool) -> dict[str, Any]:
    """A block as the API has it; empty where its text comes in deltas."""
    text = block.text if complete else ""
    if block.kind == "text":
        return {"type": "text", "text": text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": _input(text)}


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call as an object; of a call that was cut, as much of them as came. What is no JSON object is
    shown as it is: a client must not run a tool with less than the model said.
    """
    try:
        value = from_json(arguments, allow_partial=True) if arguments.strip() else {}
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}


def _block_event(event: BlockEvent) -> bytes:
    index, block = event.block.index, event.block
    if event.what == "start":
        return _json_event("content_block_start", index=index, content_block=_content(block, complete=False))
    if event.what == "end":
        return _json_event("content_block_stop", index=index)
    kinds = {
        "text": {"type": "text_delta", "text": event.text},
        "reasoning": {"type": "thinking_delta", "thinking": event.text},
        "call": {"type": "input_json_delta", "partial_json": event.text},
    }
    return _json_event("content_block_delta", index=index, delta=kinds[block.kind])


def _json_event(name: str, **fields: Any) -> bytes:
    return _event(name, msgspec.json.encode({"type": name, **fields}))


def _event(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


FAULTS = FaultForm(MessagesError, error_body)
ROUTES = (
    Route(
        "POST",
        PATH,
        create,
        "The next message of a conversation, as Anthropic's API has it.",
        request=MessagesRequest,
        response=MessagesResponse,
        streams=True,
        faults=FAULTS,
    ),
    Route(
        "POST",
        f"{PATH}/count_tokens",
        count_tokens,
        "How many tokens a conversation has.",
        request=MessagesInput,
        response=CountResponse,
        faults=FAULTS,
    ),
)
