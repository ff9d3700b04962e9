"""The client of `quire bench serve`: sends requests on time and writes down when each chunk of an answer arrived.

It runs beside what it measures, so it does little: bodies are made before the run, and of the chunks only the first and
the last are parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from serving.bench.serve_metrics import RequestTrace
from serving.bench.serve_requests import ServeRequest
from serving.errors import UsageError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDPOINTS = (COMPLETIONS, CHAT)
DONE = b"[DONE]"
MAX_ERROR_CHARS = 300


@dataclass(frozen=True)
class Target:
    """Where requests go, and what is the same in all of them.

    Attributes:
        base_url: without a path, such as http://127.0.0.1:8000.
        endpoint: one of ENDPOINTS.
        model: as the server calls it.
        api_key: sent as a bearer token; None = none.
        ignore_eos: ask for exactly the wanted number of tokens, and let anything else count as a failure.
        temperature: of the sampling.
        timeout_s: longest time for one request.
    """

    base_url: str
    endpoint: str
    model: str
    api_key: str | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout_s: float = 3600.0

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        key = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return {"Content-Type": "application/json", **key}

    def body(self, request: ServeRequest) -> bytes:
        """The JSON body of a request."""
        body: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        body["temperature"] = self.temperature
        if self.endpoint == CHAT:
            message = {"role": "user", "content": request.prompt}
            body |= {"messages": [message], "max_completion_tokens": request.output_len}
        else:
            body |= {"prompt": request.prompt, "max_tokens": request.output_len}
        if self.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


class StreamFault(Exception):
    """An answer that cannot be measured. Its text says why."""


@dataclass
class StreamReader:
    """Reads the server-sent events of one answer.

    Attributes:
        chunk_times: when each chunk with an answer in it arrived, as `feed` was told.
        last: the newest event that was not `[DONE]`.
        is_done: the server said that the stream is whole.
    """

    chunk_times: list[float] = field(default_factory=list)
    last: bytes = b""
    is_done: bool = False
    _rest: bytes = b""

    def feed(self, data: bytes, now: float) -> None:
        """Take what was read from the socket at time `now`.

        Raises:
            StreamFault: the server reported an error.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, event: bytes, now: float) -> None:
        if event == DONE:
            self.is_done = True
            return
        if event.startswith(b'{"error"'):
            raise StreamFault(error_message(event))
        self.last = event
        # Inside a JSON string the quotes would be escaped, so these bytes can only be the field itself.
        if b'"choices":[]' in event or b'"choices": []' in event:
            return  # the usage at the end
        if not self.chunk_times and _is_role_only(event):
            return  # opens the answer of a chat before there is a token
        self.chunk_times.append(now)

    def usage(self) -> tuple[int, int]:
        """Prompt tokens and output tokens, as the server counted them.

        Raises:
            StreamFault: the stream was cut, held no answer, or no usage.
        """
        if not self.is_done:
            raise StreamFault(f"the stream was cut after {len(self.chunk_times)} chunks: it has no [DONE]")
        if not self.chunk_times:
            raise StreamFault("the stream held no answer")
        try:
            usage = json.loads(self.last)["usage"]
            return int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        except (ValueError, TypeError, KeyError):
            raise StreamFault(
                "the last chunk has no usage: the server must support stream_options.include_usage"
            ) from None


def _is_role_only(event: bytes) -> bool:
    """Whether a chunk only says who speaks. Counting it would make any server's first token look instant."""
    try:
        choice = json.loads(event)["choices"][0]
        delta = choice.get("delta")
        return (
            delta is not None
            and choice.get("finish_reason") is None
            and not any(value for name, value in delta.items() if name != "role")
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise StreamFault(f"not an answer: {event[:80].decode(errors='replace')}") from None


def error_message(body: bytes) -> str:
    """What an error body of the OpenAI API says, on one line, or the body itself."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(body)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    return " ".join(text.split())[:MAX_ERROR_CHARS]


async def send(
    session: aiohttp.ClientSession, target: Target, body: bytes, output_len: int, clock: Callable[[], float]
) -> RequestTrace:
    """Send one request and record its answer. Never raises for what the server does: the trace says what failed.

    Args:
        output_len: how many tokens there must be if the end of sequence is ignored.
        clock: seconds since the start of the run.
    """
    reader = StreamReader()
    sent = clock()
    try:
        url = target.base_url + target.endpoint
        async with session.post(url, data=body, headers=target.headers) as response:
            if response.status != 200:
                detail = error_message(await response.content.read(4096))
                raise StreamFault(f"HTTP {response.status}: {detail or response.reason}")
            async for data in response.content.iter_any():
                reader.feed(data, clock())
        num_prompt, num_output = reader.usage()
        if target.ignore_eos and num_output != output_len:
            raise StreamFault(f"ended after {num_output} tokens instead of {output_len}")
    except StreamFault as fault:
        return RequestTrace(sent, tuple(reader.chunk_times), error=str(fault))
    except TimeoutError:
        return RequestTrace(sent, tuple(reader.chunk_times), error=f"not answered within {target.timeout_s:g} s")
    except (aiohttp.ClientError, OSError) as error:
        return RequestTrace(sent, tuple(reader.chunk_times), error=f"{type(error).__name__}: {error}")
    return RequestTrace(sent, tuple(reader.chunk_times), num_prompt, num_output)


@dataclass(frozen=True)
class Run:
    """What a run recorded.

    Attributes:
        traces: of the requests, in order.
        duration_s: from the start to the end of the last request.
        client_cpu_s: CPU time that this process took meanwhile.
    """

    traces: list[RequestTrace]
    duration_s: float
    client_cpu_s: float


async def run_requests(
    target: Target,
    requests: Sequence[ServeRequest],
    times_s: Sequence[float],
    *,
    max_concurrency: int | None = None,
    warmups: Sequence[ServeRequest] = (),
) -> Run:
    """Send all requests, each at its time, and wait for all answers.

    Args:
        times_s: when to send each, in seconds after the start, rising.
        max_concurrency: most requests at a time; one whose turn has come waits, and its time starts when it is sent.
        warmups: sent one after the other before the start; they must succeed.

    Raises:
        UsageError: a warm-up failed: the server is not there, or refuses what it is sent.
    """
    bodies = [target.body(request) for request in requests]
    timeout = aiohttp.ClientTimeout(total=target.timeout_s)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        for warmup in warmups:
            trace = await send(session, target, target.body(warmup), warmup.output_len, time.perf_counter)
            if trace.error is not None:
                raise UsageError(f"the first request to {target.base_url}{target.endpoint} failed: {trace.error}")
        gate = contextlib.nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
        start, start_cpu = time.perf_counter(), time.process_time()

        def clock() -> float:
            return time.perf_counter() - start

        async def one(body: bytes, output_len: int) -> RequestTrace:
            async with gate:
                return await send(session, target, body, output_len, clock)

        async with asyncio.TaskGroup() as group:
            tasks = []
            for request, body, at in zip(requests, bodies, times_s, strict=True):
                if (wait := at - clock()) > 0:
                    await asyncio.sleep(wait)
                tasks.append(group.create_task(one(body, request.output_len)))
        return Run([task.result() for task in tasks], clock(), time.process_time() - start_cpu)


async def first_model(base_url: str, headers: Mapping[str, str]) -> str:
    """The name of the first model that a server has.

    Raises:
        UsageError: the server is not there, or does not say.
    """
    url = f"{base_url}/v1/models"
    try:
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url, headers=headers) as response:
            body = await response.read()
    except (aiohttp.ClientError, OSError) as error:
        raise UsageError(f"cannot reach {url}: {error}") from error
    if response.status != 200:
        raise UsageError(f"{url} answers HTTP {response.status}: {error_message(body)}")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UsageError(f"{url} lists no models; name one with --model.") from error
