"""What both kinds of asynchronous engine do around a request: make it, and merge what waits for its consumer into one
output, however slow that is (`OutputStream`). No jax.

The engine gives deltas. A consumer that keeps up gets each of them as it is; one that does not gets their sum. Whoever
asked for cumulative outputs gets them from here too: the sum is then never emptied.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from msgspec import structs

from engine.client import EngineInfo
from engine.errors import InvalidRequestError, RequestFailedError
from engine.input_processor import InputProcessor, Prompt
from engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from engine.requests.request import Request
from engine.sampling_params import RequestOutputKind, SamplingParams


def make_request(
    info: EngineInfo,
    inputs: InputProcessor,
    prompt: Prompt,
    params: SamplingParams | None,
    *,
    request_id: str | None,
    priority: int,
) -> Request:
    """Check a prompt with its parameters, or with the model's recommended ones, and make the request.

    Raises:
        InvalidRequestError, ContextLengthError: as `InputProcessor.make`; or a priority that nobody would look at.
    """
    if priority != 0 and not info.priorities:
        raise InvalidRequestError("priority needs scheduling_policy='priority'.", "priority")
    if params is None:
        params = info.default_sampling.replace(output_kind=RequestOutputKind.DELTA)
    return inputs.make(prompt, params, request_id=request_id, priority=priority)


def as_deltas(request: Request) -> Request:
    """The request that the engine gets: cumulative outputs are summed up on the consumer's side, where the sum is made
    once per look and not once per token.
    """
    if request.params.output_kind is not RequestOutputKind.CUMULATIVE:
        return request
    return replace(request, params=request.params.replace(output_kind=RequestOutputKind.DELTA))


@dataclass
class _Sum:
    """The deltas of one completion, added up."""

    index: int
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, delta: CompletionOutput) -> None:
        if delta.text:
            self.text.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.logprobs
            self.cumulative_logprob = delta.cumulative_logprob
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    def total(self) -> CompletionOutput:
        self.text = ["".join(self.text)]
        return CompletionOutput(
            index=self.index,
            text=self.text[0],
            token_ids=tuple(self.token_ids),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class OutputStream:
    """One request's outputs on their way to its one consumer. All calls from one event loop.

    Args:
        cumulative: each output carries everything so far, not only what is new.

    Attributes:
        ended: the consumer has been given the last output, or an exception.
    """

    def __init__(self, *, cumulative: bool) -> None:
        self.ended = False
        self._cumulative = cumulative
        self._newest: RequestOutput | None = None  # what is not a sum is taken from it
        self._sums: dict[int, _Sum] | None = None  # by index; None while the newest output is all there is
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput) -> None:
        """Add a delta, and wake the consumer."""
        if self._cumulative or self._newest is not None:
            if self._sums is None:
                self._sums = {}
                self._add(self._newest)
            self._add(output)
        self._newest = output
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with an exception, after what waits already."""
        self._error = error
        self._wake()

    async def get(self) -> RequestOutput:
        """Everything that came since the last look; waits for something.

        Raises:
            RequestFailedError: the request ended with an error.
            Whatever `fail` was given.
        """
        while self._newest is None:
            if self._error is not None:
                self.ended = True
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        output, self._newest = self._newest, None
        self.ended = output.finished
        if output.error is not None:
            raise RequestFailedError(output.error)
        if self._sums is None:
            return output
        totals = [total.total() for _, total in sorted(self._sums.items())]
        if not self._cumulative:
            self._sums = None
        return structs.replace(output, outputs=totals)

    def _add(self, output: RequestOutput | None) -> None:
        assert self._sums is not None
        for completion in () if output is None else output.outputs:
            self._sums.setdefault(completion.index, _Sum(completion.index)).add(completion)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
