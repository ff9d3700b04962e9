"""`/v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from aiohttp import web

from engine.errors import InvalidRequestError
from engine.outputs import CompletionOutput, RequestOutput
from engine.sampling_params import MAX_N, SamplingParams
from serving.endpoints.chunks import ChunkMaker
from serving.endpoints.logprobs import TokenNames, completion_logprobs, prompt_logprobs
from serving.endpoints.prompts import completion_prompts
from serving.endpoints.usage import UsageCounter, usage_of
from serving.http.body import read_body
from serving.http.context import ServerContext, context_of
from serving.http.generation import Job, final_outputs, make_request_id, merged, numbered
from serving.http.reply import reply
from serving.http.routes import Route
from serving.http.sse import DONE, send_events
from serving.protocol.completions import DEFAULT_MAX_TOKENS, CompletionRequest, CompletionResponse

PATH = "/v1/completions"


async def create(request: web.Request) -> web.StreamResponse:
    """`POST /v1/completions`."""
    context = context_of(request)
    body = await read_body(request, context, CompletionRequest)
    body.check_missing()
    body.check_stream()
    model = context.check_model(body.model)
    params = _params(context, body)
    request_id = make_request_id(request, body.request_id, "cmpl-")
    prompts = await completion_prompts(context, body)
    base = Job(
        request_id=request_id,
        endpoint=PATH,
        model=model,
        prompt=prompts[0],
        params=params,
        priority=body.priority or 0,
        trace_parent=request.headers.get("traceparent"),
    )
    if len(prompts) * params.n > MAX_N:
        raise InvalidRequestError(
            f"n={params.n} for {len(prompts)} prompts is more than the {MAX_N} choices that one request may have.", "n"
        )
    jobs = [numbered(base, number, len(prompts), prompt) for number, prompt in enumerate(prompts)]
    answer = CompletionAnswer(context, body, base)
    if body.stream:
        return await send_events(request, answer.events(jobs))
    return reply(answer.response(await final_outputs(context, jobs)))


def _params(context: ServerContext, body: CompletionRequest) -> SamplingParams:
    """The parameters of each prompt.

    Raises:
        InvalidRequestError: a value is out of range.
    """
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and body.echo:
        max_tokens = 1  # only the prompt is shown, but a request makes at least one token
    shown_prompt = body.prompt_logprobs
    if body.echo and body.logprobs is not None and shown_prompt is None:
        shown_prompt = body.logprobs
    return body.sampling_params(
        context.client.info.default_sampling,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=shown_prompt,
    )


class CompletionAnswer:
    """Forms what the engine gives into the API's JSON, for one HTTP request."""

    def __init__(self, context: ServerContext, body: CompletionRequest, job: Job) -> None:
        if body.echo and context.client.tokenizer is None:
            raise InvalidRequestError("echo needs a tokenizer; this engine has none (skip_tokenizer_init).", "echo")
        self.body = body
        self.context = context
        self.n = job.params.n
        self.names = TokenNames(context.client.tokenizer, bool(body.return_tokens_as_token_ids))
        self.envelope = {
            "id": job.request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": job.model,
        }
        self.hides_output = body.max_tokens == 0
        self.ended: set[int] = set()
        self.offsets: dict[int, int] = {}  # of a choice: characters that its logprobs have described

    def response(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The whole answer; choices in order of the prompts."""
        choices = [
            self._choice(number * self.n + completion.index, output, completion, first=True)
            for number, output in enumerate(outputs)
            for completion in output.outputs
        ]
        return {**self.envelope, "choices": choices, "usage": self._shown_usage(usage_of(outputs))}

    async def events(self, jobs: Sequence[Job]) -> AsyncGenerator[bytes]:
        """The answer as a stream."""
        body, counter = self.body, UsageCounter()
        chunks = ChunkMaker(self.envelope, _text_choice, usage_in_all=body.includes_usage)
        only_text = body.logprobs is None and not body.return_token_ids and not body.continuous_usage
        begun: set[int] = set()
        async with aclosing(merged(self.context, jobs)) as outputs:
            async for number, output in outputs:
                counter.count(number, output)
                for completion in output.outputs:
                    index = number * self.n + completion.index
                    first = index not in begun
                    if only_text and not first and completion.finish_reason is None:
                        if completion.text:
                            yield chunks.text(index, completion.text)
                        continue
                    if self._is_silent(completion, first=first, told=index in self.ended):
                        continue
                    begun.add(index)
                    choice = self._choice(index, output, completion, first=first)
                    usage = self._shown_usage(counter.usage()) if body.continuous_usage else None
                    yield chunks.event([choice], usage)
        if body.includes_usage:
            yield chunks.event([], self._shown_usage(counter.usage()))
        yield DONE

    def _is_silent(self, completion: CompletionOutput, *, first: bool, told: bool) -> bool:
        """True if an output of a stream says nothing new of this completion."""
        if told or (self.hides_output and not first):
            return True
        has_news = completion.token_ids or completion.text or completion.finished
        return not has_news and not (first and self.body.echo)

    def _choice(
        self, index: int, output: RequestOutput, completion: CompletionOutput, *, first: bool
    ) -> dict[str, Any]:
        """What an output says of one completion; with the prompt where it is wanted and this is the first time."""
        hidden = self.hides_output
        if completion.finished or hidden:
            self.ended.add(index)
        choice = {
            "index": index,
            "text": (self._echo(output) if first else "") + ("" if hidden else completion.text),
            "logprobs": self._logprobs(index, output, completion, first=first),
            "finish_reason": "length" if hidden else completion.finish_reason,
            "stop_reason": None if hidden else completion.stop_reason,
        }
        if first and self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self.body.return_token_ids:
            choice["token_ids"] = [] if hidden else list(completion.token_ids)
            if first:
                choice["prompt_token_ids"] = list(output.prompt_token_ids)
        return choice

    def _echo(self, output: RequestOutput) -> str:
        """The prompt's text, if it is to be shown.

        Raises:
            InvalidRequestError: it is given as ids, and there is no tokenizer.
        """
        if not self.body.echo:
            return ""
        if output.prompt is not None and self.body.truncate_prompt_tokens is None:
            return output.prompt
        tokenizer = self.context.client.tokenizer
        assert tokenizer is not None, "checked before the request was started"
        return tokenizer.decode(output.prompt_token_ids)

    def _logprobs(
        self, index: int, output: RequestOutput, completion: CompletionOutput, *, first: bool
    ) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        tokens = () if self.hides_output else completion.token_ids
        logprobs = [] if self.hides_output else completion.logprobs or []
        if first and self.body.echo and output.prompt_logprobs is not None:
            tokens = (*output.prompt_token_ids, *tokens)
            logprobs = [*output.prompt_logprobs, *logprobs]
        shown, self.offsets[index] = completion_logprobs(
            tokens, logprobs, self.body.logprobs, self.names, self.offsets.get(index, 0)
        )
        return shown

    def _shown_usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The usage without the token that was made only because one must be."""
        return {**usage, "completion_tokens": 0, "total_tokens": usage["prompt_tokens"]} if self.hides_output else usage


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}


ROUTES = (
    Route(
        "POST",
        PATH,
        create,
        "Go on with one or many texts.",
        request=CompletionRequest,
        response=CompletionResponse,
        streams=True,
        event=CompletionResponse,
    ),
)
