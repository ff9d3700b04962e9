"""Outputs as what is new of them. The prompt and its ids never go back: the side that asked has them."""

from __future__ import annotations

from dataclasses import dataclass

from engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from engine.remote.wire import Completion, Output, Position, Step, error_to_wire
from engine.requests.request import Request
from engine.stream import OutputStream

_METRICS = RequestMetrics.__struct_fields__


@dataclass(eq=False)
class _Sent:
    """What the other side knows of a request."""

    handle: int
    num_prompt_logprobs: int = 0
    started: bool = False
    dropped: bool = False


class DeltaWriter:
    """The worker's side: from the events of a step to one message. Holds what was sent of each live request."""

    def __init__(self) -> None:
        self._live: dict[str, _Sent] = {}

    def open(self, request_id: str, handle: int) -> None:
        """A request comes in; what it gives goes out under its handle."""
        self._live[request_id] = _Sent(handle)

    def drop(self, handle: int) -> str | None:
        """Send nothing more of a request. Returns its id; None if it has ended."""
        request_id = next((name for name, sent in list(self._live.items()) if sent.handle == handle), None)
        if request_id is not None:
            self._live[request_id].dropped = True
        return request_id

    def write(self, events: list[tuple[str, RequestOutput | Exception]]) -> Step:
        """One step's events as one message."""
        step = Step([], [], [])
        for request_id, event in events:
            sent = self._live[request_id]
            if sent.dropped:  # the other side was told of its end
                if isinstance(event, Exception) or event.finished:
                    del self._live[request_id]
                continue
            if isinstance(event, Exception):
                step.refused.append((sent.handle, error_to_wire(event)))
                del self._live[request_id]
                continue
            first = event.outputs[0]
            if sent.started and not event.finished and len(event.outputs) == 1 and first.logprobs is None:
                step.tokens.append((sent.handle, first.token_ids, first.text))
                continue
            step.outputs.append(_output(event, sent))
            sent.started = True
            if event.finished:
                del self._live[request_id]
        return step


def _output(output: RequestOutput, sent: _Sent) -> Output:
    scores, metrics = output.prompt_logprobs, output.metrics
    if scores is not None and len(scores) == sent.num_prompt_logprobs:
        scores = None
    elif scores is not None:
        sent.num_prompt_logprobs = len(scores)
    return Output(
        sent.handle,
        [_completion(c) for c in output.outputs],
        output.finished,
        output.num_cached_tokens,
        None if scores is None else [None if p is None else _position(p) for p in scores],
        [getattr(metrics, name) for name in _METRICS] if output.finished and metrics is not None else None,
        output.error,
        output.embedding,
    )


def _completion(c: CompletionOutput) -> Completion:
    logprobs = None if c.logprobs is None else [_position(position) for position in c.logprobs]
    return Completion(c.index, c.text, c.token_ids, c.cumulative_logprob, logprobs, c.finish_reason, c.stop_reason)


def _position(position: TokenLogprobs) -> Position:
    return [(token, p.logprob, p.rank, p.decoded_token) for token, p in position.items()]


@dataclass(eq=False)
class LiveRequest:
    """The other side: a request that waits for outputs, and what every one of them repeats."""

    request: Request
    stream: OutputStream
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def put_tokens(self, token_ids: tuple[int, ...], text: str) -> None:
        """New tokens of the only completion, and nothing else."""
        self._put([CompletionOutput(0, text, token_ids)])

    def put(self, output: Output) -> None:
        """Anything else."""
        self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = [None if p is None else _scores(p) for p in output.prompt_logprobs]
        metrics = None if output.metrics is None else RequestMetrics(*output.metrics)  # type: ignore[arg-type]
        completions = [
            CompletionOutput(
                c.index,
                c.text,
                c.token_ids,
                c.cumulative_logprob,
                None if c.logprobs is None else [_scores(p) for p in c.logprobs],
                c.finish_reason,
                c.stop_reason,
            )
            for c in output.completions
        ]
        self._put(completions, output.finished, metrics, output.error, output.embedding)

    def _put(
        self,
        completions: list[CompletionOutput],
        finished: bool = False,
        metrics: RequestMetrics | None = None,
        error: str | None = None,
        embedding: tuple[float, ...] | None = None,
    ) -> None:
        request = self.request
        self.stream.put(
            RequestOutput(
                request.request_id,
                request.prompt,
                request.prompt_token_ids,
                completions,
                finished,
                self.prompt_logprobs,
                self.num_cached_tokens,
                metrics,
                error,
                embedding,
            )
        )


def _scores(position: Position) -> TokenLogprobs:
    return {token: Logprob(logprob, rank, text) for token, logprob, rank, text in position}
