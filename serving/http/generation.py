"""From a checked request to outputs of the engine, with the observers told: the one way there for every endpoint."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from engine.errors import InvalidRequestError, QueueFullError
from engine.input_processor import Prompt
from engine.outputs import CompletionOutput, EmbeddingOutput, RequestOutput
from engine.pooling import Pooling
from engine.sampling_params import SamplingParams
from serving.http.context import ServerContext
from serving.http.errors import CLIENT_GONE, RETRY_AFTER, ApiError, fault_of
from serving.http.observer import RequestEnd, RequestStart

logger = logging.getLogger("quire.serving")

_ID = re.compile(r"[\x21-\x7e]{1,256}")  # visible ASCII: it also goes into a header and into logs


@dataclass(frozen=True)
class Job:
    """One prompt for the engine.

    Attributes:
        request_id: in the engine; the one in the answer, with a suffix if the request has several prompts.
        endpoint, model: as the client sees them.
        prompt: checked as far as HTTP can; with its token ids.
        params: FINAL_ONLY or DELTA.
        priority: 0 unless the request brings one.
        trace_parent: the W3C `traceparent` header, if there was one.
    """

    request_id: str
    endpoint: str
    model: str
    prompt: Prompt
    params: SamplingParams
    priority: int = 0
    trace_parent: str | None = None


@dataclass(frozen=True)
class EmbeddingJob:
    """One prompt that is only pooled. Fields as in `Job`, and as `EngineClient.embed`'s."""

    request_id: str
    endpoint: str
    model: str
    prompt: Prompt
    pooling: Pooling
    normalize: bool
    trace_parent: str | None = None


def make_request_id(request: web.Request, given: str | None, prefix: str) -> str:
    """The id of an answer: `prefix` and what the body or the header X-Request-Id says, or something random.

    Raises:
        InvalidRequestError: the id is too long, or not visible ASCII.
    """
    chosen = given if given is not None else request.headers.get("X-Request-Id")
    if chosen is None:
        return prefix + uuid.uuid4().hex
    if not _ID.fullmatch(chosen):
        raise InvalidRequestError("request_id must be 1 to 256 visible ASCII characters.", "request_id")
    return prefix + chosen


def _prompt_length(prompt: Prompt) -> int:
    ids = prompt.get("prompt_token_ids", ()) if isinstance(prompt, dict) else prompt
    return len(ids) if not isinstance(ids, str) else 0


async def generate(context: ServerContext, job: Job) -> AsyncGenerator[RequestOutput]:
    """The outputs of one job. Closing the generator aborts it: use `aclosing`, garbage collection is late.

    An id that a live request has (a client that tries again, say) gets a suffix in the engine.

    Raises:
        As `EngineClient.generate`.
    """
    observers, begun = context.observers, time.monotonic()
    engine_ids = context.traffic.engine_ids
    if job.request_id in engine_ids:
        job = replace(job, request_id=f"{job.request_id}-{uuid.uuid4().hex[:8]}")
    start = RequestStart(
        job.request_id, job.endpoint, job.model, job.params, _prompt_length(job.prompt), begun, job.trace_parent
    )
    record = _Record(start)
    if context.settings.enable_log_requests:
        logger.info(
            "%s %s: %d prompt tokens, priority %d, %s",
            job.endpoint,
            job.request_id,
            start.num_prompt_tokens,
            job.priority,
            job.params,
        )
    engine_ids.add(job.request_id)
    stream = context.client.generate(job.prompt, job.params, request_id=job.request_id, priority=job.priority)
    error: BaseException | None = None
    try:
        async with aclosing(stream):  # type: ignore[type-var]  # an async generator, by its contract
            async for output in stream:
                if record.output is None:
                    for observer in observers:
                        observer.on_start(start)
                record.output = output
                if observers:
                    record.count(context, output)
                yield output
    except BaseException as caught:
        error = caught
        raise
    finally:
        engine_ids.discard(job.request_id)
        if observers:
            record.end(context, error)


async def embed(context: ServerContext, job: EmbeddingJob) -> EmbeddingOutput:
    """The embedding of one prompt.

    Raises:
        As `EngineClient.embed`; TimeoutError: it took longer than request_timeout.
    """
    engine_ids = context.traffic.engine_ids
    if job.request_id in engine_ids:
        job = replace(job, request_id=f"{job.request_id}-{uuid.uuid4().hex[:8]}")
    record = _Record(
        RequestStart(
            job.request_id,
            job.endpoint,
            job.model,
            None,
            _prompt_length(job.prompt),
            time.monotonic(),
            job.trace_parent,
        )
    )
    engine_ids.add(job.request_id)
    error: BaseException | None = None
    try:
        async with asyncio.timeout(context.settings.request_timeout):
            output = await context.client.embed(
                job.prompt, pooling=job.pooling, normalize=job.normalize, request_id=job.request_id
            )
        record.end_embedding(context, output)
        return output
    except BaseException as caught:
        error = caught
        raise
    finally:
        engine_ids.discard(job.request_id)
        if context.observers and error is not None:
            record.end(context, error)


class _Record:
    """What the observers are told of one job."""

    def __init__(self, start: RequestStart) -> None:
        self.start = start
        self.output: RequestOutput | None = None
        self.num_tokens = 0
        self.first_token: float | None = None

    def count(self, context: ServerContext, output: RequestOutput) -> None:
        """New tokens came."""
        if num_new := sum(len(completion.token_ids) for completion in output.outputs):
            now = time.monotonic()
            self.num_tokens += num_new
            if self.first_token is None:
                self.first_token = now
            for observer in context.observers:
                observer.on_tokens(self.start.request_id, num_new, now)

    def end_embedding(self, context: ServerContext, output: EmbeddingOutput) -> None:
        """It is over, and well: in the form that observers know, one completion without tokens."""
        if not context.observers:
            return
        self.output = RequestOutput(
            request_id=output.request_id,
            prompt=None,
            prompt_token_ids=(),
            outputs=[CompletionOutput(0, "", (), finish_reason="stop")],
            finished=True,
            num_cached_tokens=output.num_cached_tokens,
            metrics=output.metrics,
        )
        for observer in context.observers:
            observer.on_start(self.start)
        self.end(context, None)

    def end(self, context: ServerContext, error: BaseException | None) -> None:
        """It is over, in whatever way."""
        if self.output is None and isinstance(error, (InvalidRequestError, QueueFullError)):
            return  # it was not accepted: the gate, which hears of all refusals, tells the observers
        if self.output is None:
            for observer in context.observers:
                observer.on_start(self.start)
        left = isinstance(error, (GeneratorExit, asyncio.CancelledError))
        if left and self.output is not None and self.output.finished:
            left, error = False, None  # the reader stopped after the last output
        status = CLIENT_GONE if left else 200 if error is None else fault_of(error).status
        reasons = tuple(c.finish_reason or "abort" for c in self.output.outputs) if self.output else ()
        ending = RequestEnd(
            request_id=self.start.request_id,
            finish_reasons=reasons or ("abort" if left else "error",),
            status=status,
            output=self.output,
            num_output_tokens=self.num_tokens,
            first_token_s=None if self.first_token is None else self.first_token - self.start.time,
            e2e_s=time.monotonic() - self.start.time,
            error=None if left or error is None else fault_of(error).message,
        )
        for observer in context.observers:
            observer.on_end(ending)


async def final_output(context: ServerContext, job: Job) -> RequestOutput:
    """The last output of a job whose kind is FINAL_ONLY.

    Raises:
        As `EngineClient.generate`; TimeoutError: it took longer than request_timeout.
    """
    last = None
    async with asyncio.timeout(context.settings.request_timeout), aclosing(generate(context, job)) as outputs:
        async for output in outputs:
            last = output
    if last is None:
        raise ApiError(500, "The engine ended a request without an output.")
    return last


async def final_outputs(context: ServerContext, jobs: Sequence[Job]) -> list[RequestOutput]:
    """The last outputs of several jobs, which run together; the first fault ends them all.

    Raises:
        As `EngineClient.generate`.
    """
    return await _all_of([final_output(context, job) for job in jobs])


async def embeddings(context: ServerContext, jobs: Sequence[EmbeddingJob]) -> list[EmbeddingOutput]:
    """The embeddings of several prompts, which run together; the first fault ends them all.

    Raises:
        As `EngineClient.embed`.
    """
    return await _all_of([embed(context, job) for job in jobs])


async def _all_of[T](works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    if len(works) == 1:
        return [await works[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as group:
        raise _first_of(group) from None
    return [task.result() for task in tasks]


async def merged(context: ServerContext, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """The outputs of several jobs as they come, each with the number of its job. Ends with the last of them.

    Raises:
        As `EngineClient.generate`.
    """
    if len(jobs) == 1:
        async with aclosing(generate(context, jobs[0])) as outputs:
            async for output in outputs:
                yield 0, output
        return
    # One place per job: a slow reader holds the jobs back, and the engine merges what waits.
    queue: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue(len(jobs))

    async def pump(number: int, job: Job) -> None:
        try:
            async with aclosing(generate(context, job)) as outputs:
                async for output in outputs:
                    await queue.put((number, output))
            await queue.put((number, None))
        except Exception as error:
            await queue.put((number, error))

    tasks = [asyncio.create_task(pump(number, job)) for number, job in enumerate(jobs)]
    try:
        live = len(jobs)
        while live:
            number, output = await queue.get()
            if isinstance(output, BaseException):
                raise output
            if output is None:
                live -= 1
            else:
                yield number, output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def require_whole(completion: CompletionOutput) -> None:
    """For APIs that have no word for an answer that the server ended.

    Raises:
        ApiError: it was aborted.
    """
    if completion.finish_reason == "abort":
        raise ApiError(503, "The request was aborted: the server shuts down.", headers=RETRY_AFTER)


def _first_of(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def numbered(job: Job, number: int, count: int, prompt: Prompt) -> Job:
    """The job with this prompt, and with an id of its own among the `count` jobs of one request."""
    return replace(job, prompt=prompt, request_id=job.request_id if count == 1 else f"{job.request_id}-{number}")
