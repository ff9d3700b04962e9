"""`RemoteEngine`: an engine in a process of its own, as an `EngineClient`. Imports no jax.

Prompts are checked and tokenized here, so that what crosses is a request that the engine cannot refuse but for its
queue. Random seeds of requests that bring none are drawn here too, in order of their arrival: they do not depend on
when the other process sees them, and go on in order if that is started again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Self

import msgspec

from engine.client import EngineInfo, RequestTimeline, StepEvent
from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.input_processor import InputProcessor, ModelLimits, Prompt
from engine.outputs import EmbeddingOutput, RequestOutput
from engine.pooling import Pooling, PoolingParams
from engine.remote.exchange import Exchange
from engine.remote.plain import from_plain, to_plain
from engine.remote.supervisor import Supervisor
from engine.remote.wire import Abort, Add, Ask, MessageTooLongError
from engine.requests.request import Request
from engine.sampling_params import SamplingParams
from engine.stream import OutputStream, as_deltas, make_request
from engine.text.tokenizer import Tokenizer


class RemoteEngine:
    """An engine in a process of its own. Made by `start`; all calls from the event loop that it was started in.

    If the process ends unexpectedly its requests end with EngineDeadError, and it is started again. Until it is ready,
    requests are refused with EngineRestartingError. If it ends again within ten minutes of that start, it stays dead.
    """

    def __init__(self, supervisor: Supervisor, exchange: Exchange, info: EngineInfo, inputs: InputProcessor) -> None:
        self._supervisor = supervisor
        self._exchange = exchange
        self._info = info
        self._inputs = inputs

    @classmethod
    async def start(cls, model: str = "demo", **settings: Any) -> Self:
        """Start the process and wait until its engine is ready. If the wait is cancelled the process is ended.

        Args:
            model, **settings: as `Engine`.

        Raises:
            QuireError: of the kind that fits, as `Engine`; EngineDeadError if the process ended without a word.
        """
        config, exchange = EngineConfig.from_flat(model=model, **settings), Exchange()
        supervisor = Supervisor(config, exchange.receive, exchange.end_all)
        ready = await supervisor.start()
        try:
            info = from_plain(EngineInfo, ready.info)
            # In a thread: a large vocabulary takes a second.
            tokenizer = await asyncio.to_thread(_load_tokenizer, ready.tokenizer_path)
        except BaseException:
            await supervisor.close()
            raise
        limits = ModelLimits(info.vocab_size, info.max_model_len, info.max_logprobs, info.eos_token_ids)
        return cls(supervisor, exchange, info, InputProcessor(limits, tokenizer, config.load.seed))

    @property
    def info(self) -> EngineInfo:
        """What never changes, also if the process is started again."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer | None:
        """A tokenizer of this process; None with `skip_tokenizer_init`."""
        return self._inputs.tokenizer

    @property
    def pid(self) -> int | None:
        """Of the engine's process; None while there is none that is ready."""
        return self._supervisor.pid

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """As `AsyncEngine.generate`; metrics come with the last output only.

        Raises:
            InvalidRequestError, ContextLengthError, QueueFullError: nothing was started.
            RequestFailedError: a step failed.
            EngineRestartingError: nothing was started; try again later.
            EngineDeadError: the process ended; or it will not serve any more.
        """
        self._supervisor.require_up()
        request = make_request(
            self._info, self._inputs, prompt, sampling_params, request_id=request_id, priority=priority
        )
        stream = self._open(request)
        try:
            while not stream.ended:
                yield await stream.get()
        finally:
            if not stream.ended:
                self.abort(request.request_id)

    async def embed(
        self, prompt: Prompt, *, pooling: Pooling = "last", normalize: bool = True, request_id: str | None = None
    ) -> EmbeddingOutput:
        """As `AsyncEngine.embed`.

        Raises:
            As `generate`; RequestFailedError also if the request was aborted.
        """
        self._supervisor.require_up()
        request = self._inputs.make_pooled(prompt, PoolingParams(pooling, normalize), request_id=request_id)
        stream = self._open(request)
        try:
            return EmbeddingOutput.of(await stream.get())  # there is one: it comes when the prompt is computed
        finally:
            if not stream.ended:
                self.abort(request.request_id)

    def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with finish reason "abort"."""
        self._supervisor.send(Abort(request_id))

    async def snapshot(self) -> dict[str, Any]:
        """As `AsyncEngine.snapshot`, and `num_engine_restarts`. Totals begin anew with a new process.

        Raises:
            EngineDeadError, EngineRestartingError: there is no process to ask.
        """
        return {**await self._ask("snapshot"), "num_engine_restarts": self._supervisor.num_restarts}

    async def recent_steps(self, since: int) -> list[StepEvent]:
        """As `AsyncEngine.recent_steps`. Linux has one monotonic clock for all processes: times may be compared with
        those of this one.

        Raises:
            As `snapshot`.
        """
        return msgspec.convert(await self._ask("recent_steps", since), list[StepEvent])

    async def timeline(self, request_id: str) -> RequestTimeline | None:
        """As `AsyncEngine.timeline`. A new process knows nothing of the requests of the old one.

        Raises:
            As `snapshot`.
        """
        return msgspec.convert(await self._ask("timeline", request_id), RequestTimeline | None)

    async def check_health(self) -> None:
        """Return if the process runs and is ready.

        Raises:
            EngineDeadError, EngineRestartingError: it does not.
        """
        self._supervisor.require_up()

    async def reset_prefix_cache(self) -> None:
        """Forget cached prefixes.

        Raises:
            As `snapshot`.
        """
        await self._ask("reset_prefix_cache")

    async def close(self) -> None:
        """Stop the process after its step, and wait for its end; it is killed if that takes longer than ten seconds.
        Live streams get EngineDeadError. A second call does no harm.
        """
        await self._supervisor.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _open(self, request: Request) -> OutputStream:
        self._exchange.require_free(request.request_id)
        handle = self._exchange.next_number()
        try:  # the text of the prompt stays here: nothing over there looks at it
            self._supervisor.send(Add(handle, to_plain(replace(as_deltas(request), prompt=None))))
        except MessageTooLongError as error:
            raise InvalidRequestError(f"the request is too long to be sent to the engine's process: {error}.") from None
        return self._exchange.open(handle, request)

    async def _ask(self, what: str, *arguments: Any) -> Any:
        self._supervisor.require_up()
        number = self._exchange.next_number()
        self._supervisor.send(Ask(number, what, list(arguments)))
        return await self._exchange.answer(number)


def _load_tokenizer(path: str | None) -> Tokenizer | None:
    return None if path is None else Tokenizer.load(path)
