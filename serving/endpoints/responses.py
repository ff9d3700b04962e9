"""`/v1/responses`, stateless, translated to the chat endpoint. One way to the engine for both."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from engine.errors import InvalidRequestError
from engine.outputs import CompletionOutput, RequestOutput
from serving.endpoints.blocks import Block, BlockEvent, Blocks
from serving.endpoints.chat import PreparedChat, prepare_chat
from serving.endpoints.responses_input import NAMES, chat_request
from serving.http.body import read_body
from serving.http.context import ServerContext, context_of
from serving.http.errors import ApiError, Fault
from serving.http.generation import final_output, generate, require_whole
from serving.http.reply import reply
from serving.http.routes import Route
from serving.http.sse import send_events
from serving.protocol.responses import ResponsesRequest, ResponsesResponse

PATH = "/v1/responses"
PREFIX = "resp_"
ITEM_PREFIXES = {"text": "msg_", "reasoning": "rs_", "call": "fc_"}


async def create(request: web.Request) -> web.StreamResponse:
    """`POST /v1/responses`."""
    context = context_of(request)
    body = await read_body(request, context, ResponsesRequest)
    try:
        chat = await prepare_chat(request, context, chat_request(body), endpoint=PATH, prefix=PREFIX)
    except InvalidRequestError as error:
        error.parameter = NAMES.get(error.parameter or "", error.parameter)
        raise
    answer = ResponseAnswer(context, body, chat)
    if body.stream:
        return await send_events(request, answer.events(generate(context, chat.job)), fault_event=answer.fault_event)
    return reply(answer.response(await final_output(context, chat.job)))


async def no_response(request: web.Request) -> web.StreamResponse:
    """`GET` and `DELETE /v1/responses/{id}`: there never is one."""
    name = request.match_info["id"]
    raise ApiError(404, f"There is no response `{name}`: this server keeps none.", "response_id")


class ResponseAnswer:
    """Forms what the engine gives into the API's JSON, for one HTTP request."""

    def __init__(self, context: ServerContext, body: ResponsesRequest, chat: PreparedChat) -> None:
        self._context = context
        self._body = body
        self._chat = chat
        self._parser = chat.make_parser()
        self._blocks = Blocks()
        self._created = int(time.time())
        self._sequence = 0

    def response(self, output: RequestOutput) -> dict[str, Any]:
        """The whole answer.

        Raises:
            ApiError: it was aborted.
        """
        [completion] = output.outputs
        require_whole(completion)
        self._feed(completion)
        return self._ended(completion, output, len(completion.token_ids))

    async def events(self, outputs: AsyncGenerator[RequestOutput]) -> AsyncGenerator[bytes]:
        """The answer as a stream."""
        num_tokens = 0
        async with aclosing(outputs):
            async for output in outputs:
                [completion] = output.outputs
                if self._sequence == 0:
                    begun = self._envelope("in_progress", [])
                    yield self._event("response.created", response=begun)
                    yield self._event("response.in_progress", response=begun)
                num_tokens += len(completion.token_ids)
                require_whole(completion)
                for event in self._feed(completion):
                    for part in self._item_events(event):
                        yield part
                if completion.finished:
                    ended = self._ended(completion, output, num_tokens)
                    yield self._event(f"response.{ended['status']}", response=ended)

    def fault_event(self, fault: Fault) -> bytes:
        """The event that ends a stream that failed."""
        error = fault.error
        return self._event("error", code=str(error["code"]), message=error["message"], param=error["param"])

    def _feed(self, completion: CompletionOutput) -> Sequence[BlockEvent]:
        deltas = self._parser.feed(completion.text)
        if not completion.finished:
            return self._blocks.feed(deltas)
        return [*self._blocks.feed([*deltas, *self._parser.finish()]), *self._blocks.finish()]

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = msgspec.json.encode({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _item_events(self, event: BlockEvent) -> Iterator[bytes]:
        block = event.block
        at = {"item_id": self._item_id(block), "output_index": block.index}
        if block.kind == "call":
            if event.what == "start":
                yield self._event("response.output_item.added", output_index=block.index, item=self._item(block, False))
            elif event.what == "delta":
                yield self._event("response.function_call_arguments.delta", **at, delta=event.text)
            else:
                done = {"arguments": block.text, "name": block.name}
                yield self._event("response.function_call_arguments.done", **at, **done)
                yield self._event("response.output_item.done", output_index=block.index, item=self._item(block, True))
            return
        at["content_index"] = 0
        name = "response.output_text" if block.kind == "text" else "response.reasoning_text"
        more = {"logprobs": []} if block.kind == "text" else {}
        if event.what == "start":
            yield self._event("response.output_item.added", output_index=block.index, item=self._item(block, False))
            yield self._event("response.content_part.added", **at, part=_part(block, ""))
        elif event.what == "delta":
            yield self._event(f"{name}.delta", **at, delta=event.text, **more)
        else:
            yield self._event(f"{name}.done", **at, text=block.text, **more)
            yield self._event("response.content_part.done", **at, part=_part(block, block.text))
            yield self._event("response.output_item.done", output_index=block.index, item=self._item(block, True))

    def _item_id(self, block: Block) -> str:
        name = self._chat.job.request_id.removeprefix(PREFIX)
        return f"{ITEM_PREFIXES[block.kind]}{name}_{block.index}"

    def _item(self, block: Block, done: bool) -> dict[str, Any]:
        status = "completed" if done else "in_progress"
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.kind == "call":
            arguments = block.text if done else ""
            return {**item, "type": "function_call", "call_id": block.id, "name": block.name, "arguments": arguments}
        content = [_part(block, block.text)] if done else []
        if block.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": [], "content": content}
        return {**item, "type": "message", "role": "assistant", "content": content}

    def _ended(self, completion: CompletionOutput, output: RequestOutput, num_tokens: int) -> dict[str, Any]:
        is_cut = completion.finish_reason == "length"
        items = [self._item(block, True) for block in self._blocks.blocks]
        return {
            **self._envelope("incomplete" if is_cut else "completed", items),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": {
                "input_tokens": len(output.prompt_token_ids),
                "input_tokens_details": {"cached_tokens": output.num_cached_tokens},
                "output_tokens": num_tokens,
                "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens()},
                "total_tokens": len(output.prompt_token_ids) + num_tokens,
            },
        }

    def _num_reasoning_tokens(self) -> int:
        """As many as its text has when it is encoded again: which of the output's tokens made it is not known."""
        text = "".join(block.text for block in self._blocks.blocks if block.kind == "reasoning")
        tokenizer = self._context.client.tokenizer
        return len(tokenizer.encode(text, False)) if text and tokenizer is not None else 0

    def _envelope(self, status: str, items: list[dict[str, Any]]) -> dict[str, Any]:
        body, job = self._body, self._chat.job
        choice = body.tool_choice
        wanted = None if body.text is None else body.text.format
        form = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)
        return {
            "id": job.request_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": job.model,
            "output": items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": job.params.temperature,
            "text": {"format": form},
            "tool_choice": (choice or "auto") if isinstance(choice, str | None) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": job.params.top_p,
            "usage": None,
            "user": body.user,
        }


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": []}


ROUTES = (
    Route(
        "POST",
        PATH,
        create,
        "The next items of a conversation.",
        request=ResponsesRequest,
        response=ResponsesResponse,
        streams=True,
    ),
    Route("GET", f"{PATH}/{{id}}", no_response, "Always 404: responses are not kept."),
    Route("DELETE", f"{PATH}/{{id}}", no_response, "Always 404: responses are not kept."),
)
