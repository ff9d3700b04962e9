"""An engine that answers by a script, and servers in the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import uvloop
from aiohttp.test_utils import TestClient, TestServer

from engine.client import EmbeddingOutput, EngineInfo, Pooling, RequestTimeline, StepEvent
from engine.errors import EngineDeadError, InvalidRequestError
from engine.input_processor import InputProcessor, ModelLimits, Prompt
from engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from engine.sampling_params import RequestOutputKind, SamplingParams
from engine.text.output_text import OutputText
from engine.text.tokenizer import Tokenizer
from serving.endpoints import ALL_ROUTES
from serving.http.app import make_app
from serving.http.context import ServerContext, make_context
from serving.http.settings import ServerSettings

TINY_MODEL = Path(__file__).parents[1] / "golden" / "tiny" / "llama"
VOCAB = 320
MODEL = "tiny"


@cache
def tiny_tokenizer() -> Tokenizer:
    """The tokenizer of the tiny golden models."""
    return Tokenizer.from_directory(TINY_MODEL)


@dataclass(frozen=True)
class Script:
    """How the fake engine answers.

    Attributes:
        answer: text of every answer; None = made from the prompt's ids and the index, the same each time.
        tokens_per_output: how many tokens each delta has, repeated.
        delay_s: before each delta.
        error: raised instead of the delta number `error_at`.
        hold: if set, no delta comes before the event is set.
    """

    answer: str | None = None
    tokens_per_output: Sequence[int] = (1,)
    delay_s: float = 0.0
    error: Exception | None = None
    error_at: int = 0
    hold: asyncio.Event | None = None


@dataclass
class FakeEngine:
    """An `EngineClient` without a model: checks as the real one, answers by `script`."""

    script: Script = field(default_factory=Script)
    tokenizer: Tokenizer | None = field(default_factory=tiny_tokenizer)
    max_model_len: int = 512
    defaults: SamplingParams = field(default_factory=SamplingParams)
    priorities: bool = False
    dead: str | None = None

    def __post_init__(self) -> None:
        self.live: dict[str, asyncio.Event] = {}
        self.seen: list[tuple[str, Any, SamplingParams, int]] = []
        self.aborted: list[str] = []
        self.steps: list[StepEvent] = []
        self._inputs = InputProcessor(ModelLimits(VOCAB, self.max_model_len, 20, (2,)), self.tokenizer, 0)

    @property
    def info(self) -> EngineInfo:
        """As `EngineClient`."""
        return EngineInfo(
            model=MODEL,
            vocab_size=VOCAB,
            embedding_size=8,
            max_model_len=self.max_model_len,
            max_num_seqs=64,
            max_logprobs=20,
            eos_token_ids=(2,),
            num_kv_blocks=100,
            block_size=16,
            priorities=self.priorities,
            default_sampling=self.defaults,
            description={"implementations": {"paged_attention": "fake"}},
        )

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """As `EngineClient`."""
        await self.check_health()
        assert sampling_params is not None and request_id is not None
        if priority != 0 and not self.priorities:
            raise InvalidRequestError("priority needs scheduling_policy='priority'.", "priority")
        request = self._inputs.make(prompt, sampling_params, request_id=request_id, priority=priority)
        if request_id in self.live:
            raise InvalidRequestError(f"request id {request_id!r} is in use by a live request.", "request_id")
        params = request.params
        self.seen.append((request_id, prompt, params, priority))
        abort = self.live[request_id] = asyncio.Event()
        answers = [Answer(self, request.prompt_token_ids, params, index) for index in range(params.n)]
        finished = False
        try:
            for number in range(10_000):
                if self.script.hold is not None and not self.script.hold.is_set():
                    waits = [asyncio.create_task(event.wait()) for event in (self.script.hold, abort)]
                    try:
                        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for wait in waits:
                            wait.cancel()
                await asyncio.sleep(self.script.delay_s)
                if self.script.error is not None and number == self.script.error_at:
                    raise self.script.error
                size = self.script.tokens_per_output[number % len(self.script.tokens_per_output)]
                for answer in answers:
                    answer.advance(size, aborted=abort.is_set())
                finished = all(answer.reason is not None for answer in answers)
                if params.output_kind is RequestOutputKind.FINAL_ONLY and not finished:
                    continue
                yield RequestOutput(
                    request_id=request_id,
                    prompt=request.prompt,
                    prompt_token_ids=request.prompt_token_ids,
                    outputs=[answer.output() for answer in answers],
                    finished=finished,
                    prompt_logprobs=prompt_logprobs(request.prompt_token_ids, params),
                    num_cached_tokens=min(3, len(request.prompt_token_ids) - 1),
                    metrics=RequestMetrics(arrival_time=request.arrival_time),
                )
                if finished:
                    return
            raise AssertionError("the fake engine went on too long")
        finally:
            del self.live[request_id]
            if not finished:
                self.aborted.append(request_id)

    async def embed(
        self, prompt: Prompt, *, pooling: Pooling = "last", normalize: bool = True, request_id: str | None = None
    ) -> EmbeddingOutput:
        """As `EngineClient`: the ids as a vector."""
        request = self._inputs.make(prompt, SamplingParams(), request_id=request_id)
        vector = [float(sum(request.prompt_token_ids[i::8])) for i in range(8)]
        norm = math.hypot(*vector) if normalize else 1.0
        return EmbeddingOutput(
            request.request_id, tuple(x / (norm or 1.0) for x in vector), len(request.prompt_token_ids)
        )

    def abort(self, request_id: str) -> None:
        """As `EngineClient`."""
        if request_id in self.live:
            self.live[request_id].set()

    async def snapshot(self) -> dict[str, Any]:
        """As `EngineClient`."""
        return {
            "num_steps": len(self.steps),
            "num_running": len(self.live),
            "num_waiting": 0,
            "kv_cache_usage": min(1.0, len(self.live) / 64),
            "num_preemptions": 0,
            "num_prefix_queried_tokens": 0,
            "num_prefix_hit_tokens": 0,
            "compiles_after_ready": 0,
        }

    async def recent_steps(self, since: int) -> list[StepEvent]:
        """As `EngineClient`: what the test put in `steps`."""
        return [step for step in self.steps if step.step_id >= since]

    async def timeline(self, request_id: str) -> RequestTimeline | None:
        """As `EngineClient`."""
        return None

    async def check_health(self) -> None:
        """As `EngineClient`."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)

    async def reset_prefix_cache(self) -> None:
        """As `EngineClient`."""

    async def close(self) -> None:
        """As `EngineClient`."""
        self.dead = "closed"


def candidates(token: int, count: int) -> TokenLogprobs:
    """`count` candidates by rank, and the token itself; logprobs are made up from ids."""
    ids = [(token + 7 * i) % VOCAB for i in range(1, (VOCAB - 1 if count < 0 else count) + 1)]
    names = tiny_tokenizer().token_text
    found = {token: Logprob(-1.5 - token / VOCAB, len(ids) + 1, names(token))}
    for rank, other in enumerate(ids, 1):
        found[other] = Logprob(-0.1 * rank, rank, names(other))
    return found


def prompt_logprobs(ids: Sequence[int], params: SamplingParams) -> list[TokenLogprobs | None] | None:
    """Made up from ids."""
    if params.prompt_logprobs is None:
        return None
    return [None, *(candidates(token, params.prompt_logprobs) for token in ids[1:])]


class Answer:
    """One completion of the fake engine, with the engine's own detokenizer and stop strings."""

    def __init__(self, engine: FakeEngine, prompt: Sequence[int], params: SamplingParams, index: int) -> None:
        script = engine.script
        if script.answer is not None and engine.tokenizer is not None:
            self.todo = engine.tokenizer.encode(script.answer, add_special_tokens=False)
        else:
            seed = zlib.crc32(repr((tuple(prompt), index)).encode())
            self.todo = [3 + (seed // (i + 1) + 31 * i) % (VOCAB - 3) for i in range(8 + seed % 9)]
        self.params, self.index = params, index
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.stop_reason: int | str | None = None
        self.text = OutputText(engine.tokenizer, tuple(prompt), params) if engine.tokenizer else None
        self.seen = [0, 0]

    def advance(self, size: int, *, aborted: bool) -> None:
        """Make up to `size` tokens."""
        if self.reason is None and aborted:
            self.reason = "abort"
        for _ in range(size):
            if self.reason is not None:
                break
            token = self.todo[len(self.tokens)] if len(self.tokens) < len(self.todo) else 2
            self.tokens.append(token)
            if token == 2 and not self.params.ignore_eos:
                self.reason = "stop"
            elif token in (self.params.stop_token_ids or ()):
                self.reason, self.stop_reason = "stop", token
            elif len(self.tokens) >= (self.params.max_tokens or 0):
                self.reason = "length"
            if self.text is not None:
                self.text.push([token], finished=self.reason is not None, stop_token=self.reason == "stop")
                if self.text.stop_match is not None:
                    self.reason, self.stop_reason = "stop", self.text.stop_match
        if self.reason is not None and self.text is not None:
            self.text.push([], finished=True)

    def output(self) -> CompletionOutput:
        """What the request's kind shows now."""
        first, start = self.seen if self.params.output_kind is RequestOutputKind.DELTA else (0, 0)
        shown = "" if self.text is None else self.text.text
        self.seen = [len(self.tokens), len(shown)]
        tokens = self.tokens[first:]
        count = self.params.logprobs
        return CompletionOutput(
            index=self.index,
            text=shown[start:],
            token_ids=tuple(tokens),
            logprobs=None if count is None else [candidates(token, count) for token in tokens],
            finish_reason=self.reason,
            stop_reason=self.stop_reason,
        )


def async_test[**P](function: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run a test in an event loop of its own, of the kind that `quire serve` runs in; one that hangs fails."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def limited() -> None:
            async with asyncio.timeout(20):
                await function(*args, **kwargs)

        uvloop.run(limited())

    return run


@contextlib.asynccontextmanager
async def serving(
    engine: FakeEngine | None = None,
    *,
    prepare: Callable[[ServerContext], ServerContext] | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[TestClient, FakeEngine]]:
    """A server of a fake engine, and a client of it."""
    engine = FakeEngine() if engine is None else engine
    context = make_context(engine, ServerSettings(**settings))
    if prepare is not None:
        context = prepare(context)
    server = TestServer(make_app(context, ALL_ROUTES), handler_cancellation=True)
    async with TestClient(server) as client:
        yield client, engine


async def stream(client: TestClient, path: str, body: Mapping[str, Any]) -> list[Any]:
    """The events of a stream, parsed; the last one must be [DONE] and is left out."""
    async with client.post(path, json={**body, "stream": True}) as response:
        text = await response.text()
        assert response.status == 200, text
        assert response.content_type == "text/event-stream"
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


async def until(condition: Callable[[], object]) -> None:
    """Return when it is true."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def post(client: TestClient, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    async with client.post(path, json=body) as response:
        return response.status, await response.json()
