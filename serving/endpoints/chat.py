"""`/v1/chat/completions`. Other APIs for conversations translate to `ChatRequest` and use `prepare_chat`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from engine.outputs import CompletionOutput, RequestOutput
from engine.sampling_params import SamplingParams
from engine.structured.params import StructuredOutputsParams
from serving.endpoints.chat_input import chat_prompt, check_chat, parser_request
from serving.endpoints.chunks import ChunkMaker
from serving.endpoints.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from serving.endpoints.prompts import engine_prompt
from serving.endpoints.usage import UsageCounter, usage_of
from serving.http.body import read_body
from serving.http.context import ServerContext, context_of
from serving.http.generation import Job, final_output, generate, make_request_id
from serving.http.parsers import AnswerReader
from serving.http.reply import reply
from serving.http.routes import Route
from serving.http.sse import DONE, send_events
from serving.parsing.deltas import ContentDelta, Delta, OutputParser, PlainParser, ReasoningDelta, ToolCallDelta
from serving.protocol.chat import ChatChunk, ChatRequest, ChatResponse

PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class PreparedChat:
    """A conversation that is ready for the engine.

    Attributes:
        body: the request.
        job: for the engine.
        reader: says how its answers are read.
        text: the prompt.
    """

    body: ChatRequest
    job: Job
    reader: AnswerReader
    text: str

    def make_parser(self) -> OutputParser:
        """A parser for one of the n answers."""
        return self.reader.parser(self.text)


async def prepare_chat(
    request: web.Request, context: ServerContext, body: ChatRequest, *, endpoint: str = PATH, prefix: str = "chatcmpl-"
) -> PreparedChat:
    """Check a conversation and turn it into a job.

    Args:
        endpoint, prefix: the path for observers, and how the id begins.

    Raises:
        ApiError, InvalidRequestError: something in it is wrong.
    """
    body.check_missing()
    body.check_stream()
    check_chat(context, body)
    model = context.check_model(body.model)
    reader = context.parsers.reader(parser_request(body))
    params = chat_params(context, body, reader)
    request_id = make_request_id(request, body.request_id, prefix)
    text = chat_prompt(context, body)
    prompt = await engine_prompt(context, body, text, add_special_tokens=bool(body.add_special_tokens))
    job = Job(
        request_id=request_id,
        endpoint=endpoint,
        model=model,
        prompt=prompt,
        params=params,
        priority=body.priority or 0,
        trace_parent=request.headers.get("traceparent"),
    )
    return PreparedChat(body, job, reader, text)


def chat_params(context: ServerContext, body: ChatRequest, reader: AnswerReader) -> SamplingParams:
    """The parameters of the answers, with what their parsers need.

    Raises:
        InvalidRequestError: a value is out of range.
    """
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = body.sampling_params(
        context.client.info.default_sampling,
        max_tokens=most,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    if reader.json_schema is not None:
        params = params.replace(structured_outputs=StructuredOutputsParams(json=reader.json_schema))
    return params if reader.skip_special_tokens else params.replace(skip_special_tokens=False)


async def create(request: web.Request) -> web.StreamResponse:
    """`POST /v1/chat/completions`."""
    context = context_of(request)
    chat = await prepare_chat(request, context, await read_body(request, context, ChatRequest))
    answer = ChatAnswer(context, chat)
    if chat.body.stream:
        return await send_events(request, answer.events())
    return reply(answer.response(await final_output(context, chat.job)))


class ChatAnswer:
    """Forms what the engine gives into the API's JSON, for one HTTP request."""

    def __init__(self, context: ServerContext, chat: PreparedChat) -> None:
        self.context = context
        self.chat = chat
        self.body = chat.body
        self.names = TokenNames(context.client.tokenizer, bool(chat.body.return_tokens_as_token_ids))
        self.created = int(time.time())

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.chat.job.request_id, "object": kind, "created": self.created, "model": self.chat.job.model}

    def _echo(self) -> str:
        """The text that the answer goes on with, if it is to be shown."""
        last = self.body.messages[-1]
        return last.content if self.body.echo and last.role == "assistant" and isinstance(last.content, str) else ""

    def response(self, output: RequestOutput) -> dict[str, Any]:
        """The whole answer."""
        made = {
            **self._envelope("chat.completion"),
            "choices": [self._choice(completion) for completion in output.outputs],
            "usage": usage_of([output]),
        }
        if self.body.prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self.body.return_token_ids:
            made["prompt_token_ids"] = list(output.prompt_token_ids)
        return made

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        parser = self.chat.make_parser()
        deltas = [*parser.feed(completion.text), *parser.finish()]
        message = self._message(deltas)
        choice = {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion),
            "finish_reason": _finish_reason(completion, has_calls="tool_calls" in message),
            "stop_reason": completion.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = list(completion.token_ids)
        return choice

    def _message(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        content = self._echo() + "".join(d.text for d in deltas if isinstance(d, ContentDelta))
        reasoning = "".join(d.text for d in deltas if isinstance(d, ReasoningDelta))
        calls = collect_calls(deltas)
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls or reasoning else "")}
        message["refusal"] = None
        if reasoning and self.body.include_reasoning:
            message["reasoning"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(completion.token_ids, completion.logprobs or [], self.body.top_logprobs or 0, self.names)

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as a stream."""
        body, counter = self.body, UsageCounter()
        chunks = ChunkMaker(self._envelope("chat.completion.chunk"), _text_choice, usage_in_all=body.includes_usage)
        only_text = not (body.logprobs or body.return_token_ids or body.continuous_usage)
        streams: dict[int, _ChoiceStream] = {}
        async with aclosing(generate(self.context, self.chat.job)) as outputs:
            async for output in outputs:
                counter.count(0, output)
                for completion in output.outputs:
                    stream = streams.get(completion.index)
                    if stream is None:
                        stream = streams[completion.index] = _ChoiceStream(self.chat.make_parser())
                        yield self._opening(chunks, output, completion.index, counter)
                    if stream.ended:
                        continue
                    deltas = stream.feed(completion)
                    if only_text and completion.finish_reason is None and (stream.is_plain or _is_content(deltas)):
                        if deltas:
                            yield chunks.text(completion.index, "".join(delta.text for delta in deltas))  # type: ignore
                        continue
                    usage = counter.usage() if body.continuous_usage else None
                    for choice in self._delta_choices(stream, completion, deltas):
                        yield chunks.event([choice], usage)
        if body.includes_usage:
            yield chunks.event([], counter.usage())
        yield DONE

    def _opening(self, chunks: ChunkMaker, output: RequestOutput, index: int, counter: UsageCounter) -> bytes:
        """The first event of an answer: whose it is."""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": self._echo()},
            "logprobs": None,
            "finish_reason": None,
        }
        more = {"prompt_token_ids": list(output.prompt_token_ids)} if self.body.return_token_ids and index == 0 else {}
        return chunks.event([choice], counter.usage() if self.body.continuous_usage else None, **more)

    def _delta_choices(
        self, stream: _ChoiceStream, completion: CompletionOutput, deltas: Sequence[Delta]
    ) -> list[dict[str, Any]]:
        """What an output says of one answer: one choice per delta; logprobs, ids and the end go with the last."""
        shown = [d for d in deltas if self.body.include_reasoning or not isinstance(d, ReasoningDelta)]
        choices = [
            {"index": completion.index, "delta": _delta(d), "logprobs": None, "finish_reason": None} for d in shown
        ]
        has_more = completion.finished or (
            (self.body.logprobs or self.body.return_token_ids or self.body.continuous_usage) and completion.token_ids
        )
        if not has_more:
            return choices
        if not choices:
            choices = [{"index": completion.index, "delta": {}, "logprobs": None, "finish_reason": None}]
        last = choices[-1]
        last["logprobs"] = self._logprobs(completion) if completion.token_ids else None
        if self.body.return_token_ids:
            last["token_ids"] = list(completion.token_ids)
        if completion.finished:
            last["finish_reason"] = _finish_reason(completion, has_calls=stream.has_calls)
            last["stop_reason"] = completion.stop_reason
        return choices


class _ChoiceStream:
    """One answer on its way: its parser, and whether it called tools or ended."""

    def __init__(self, parser: OutputParser) -> None:
        self._parser = parser
        self.is_plain = isinstance(parser, PlainParser)
        self.has_calls = False
        self.ended = False

    def feed(self, completion: CompletionOutput) -> list[Delta]:
        """The deltas of an output."""
        deltas = self._parser.feed(completion.text)
        if completion.finished:
            deltas = [*deltas, *self._parser.finish()]
            self.ended = True
        if not self.is_plain and any(isinstance(delta, ToolCallDelta) for delta in deltas):
            self.has_calls = True
        return deltas


def _is_content(deltas: Sequence[Delta]) -> bool:
    return all(type(delta) is ContentDelta for delta in deltas)


def _delta(delta: Delta) -> dict[str, Any]:
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    if isinstance(delta, ReasoningDelta):
        return {"reasoning": delta.text}
    call: dict[str, Any] = {"index": delta.index, "function": {"arguments": delta.arguments}}
    if delta.id is not None:
        call |= {"id": delta.id, "type": "function"}
    if delta.name is not None:
        call["function"] = {"name": delta.name, "arguments": delta.arguments}
    return {"tool_calls": [call]}


def collect_calls(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    """The tool calls of an answer that is not streamed."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            call = calls.setdefault(
                delta.index, {"id": None, "type": "function", "function": {"name": None, "arguments": ""}}
            )
            call["id"] = call["id"] or delta.id
            call["function"]["name"] = call["function"]["name"] or delta.name
            call["function"]["arguments"] += delta.arguments
    return [calls[index] for index in sorted(calls)]


def _finish_reason(completion: CompletionOutput, *, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and completion.finish_reason == "stop" else completion.finish_reason


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}


ROUTES = (
    Route(
        "POST",
        PATH,
        create,
        "The next message of a conversation.",
        request=ChatRequest,
        response=ChatResponse,
        streams=True,
        event=ChatChunk,
    ),
)
