"""From sampled tokens to `RequestOutput`s: detokenization, stop strings, and what each output kind carries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from engine.pooling import finish_pooling
from engine.requests.request import Request
from engine.requests.sequence import FinishReason, Sequence, SequenceStatus
from engine.sampling_params import RequestOutputKind
from engine.text.output_text import OutputText
from engine.text.tokenizer import Tokenizer


@dataclass
class _Completion:
    """One of the n completions: its sequence, its text, and how many of its tokens the user has seen."""

    sequence: Sequence
    text: OutputText | None
    seen_tokens: int = 0


@dataclass
class RequestRecord:
    """One request on its way out.

    Attributes:
        request: what was asked.
        completions: in order of their index.
        error: why it failed, if it did.
        pooled: float32[E], sum of the hidden states that count so far; None unless it is a pooled request.
        reported: True once its final output was made.
    """

    request: Request
    completions: list[_Completion] = field(default_factory=list)
    error: str | None = None
    pooled: np.ndarray | None = None
    reported: bool = False

    @property
    def sequences(self) -> list[Sequence]:
        """The n sequences."""
        return [c.sequence for c in self.completions]

    @property
    def finished(self) -> bool:
        """True once every completion ended."""
        completions = self.completions
        if len(completions) == 1:
            return completions[0].sequence.status is SequenceStatus.FINISHED
        return all(c.sequence.finished for c in completions)


class OutputProcessor:
    """Turns tokens into text and records into outputs. Knows nothing of scheduling: stop strings found are returned,
    not acted on.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer

    def open(self, request: Request, sequences: list[Sequence]) -> RequestRecord:
        """Start the record of a request."""
        record = RequestRecord(request)
        for sequence in sequences:
            detokenize = self.tokenizer is not None and request.params.detokenize
            text = (
                OutputText(self.tokenizer, request.prompt_token_ids, request.params)
                if detokenize and self.tokenizer
                else None
            )
            record.completions.append(_Completion(sequence, text))
        return record

    def push(
        self, record: RequestRecord, sequence: Sequence, token: int, ends: bool, is_stop_token: bool
    ) -> str | None:
        """Feed a token that was just committed.

        Args:
            record: of the sequence's request.
            sequence: whose.
            token: the next one of its text.
            ends: whether it is the last.
            is_stop_token: whether it is the last because it is EOS or a stop token.

        Returns:
            The stop string that this token completed, or None. If the sequence has not ended otherwise, the caller
            ends it.
        """
        text = record.completions[sequence.index].text
        if text is None:
            return None
        if ends:
            text.push([token], finished=True, stop_token=is_stop_token)
        else:
            text.add(token)
        return text.stop_match

    def output(self, record: RequestRecord) -> RequestOutput | None:
        """The output to show now, or None if this request's kind has nothing to show yet. Shows the end exactly
        once.
        """
        request = record.request
        kind, finished = request.params.output_kind, record.finished
        if record.reported or (kind is RequestOutputKind.FINAL_ONLY and not finished):
            return None
        record.reported = finished
        first = record.completions[0].sequence
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            [self._completion(c, kind) for c in record.completions],
            finished,
            first.prompt_logprobs,
            first.num_cached_tokens,
            _metrics(record),
            record.error,
            None if request.pooling is None else _embedding(record),
        )

    def _completion(self, completion: _Completion, kind: RequestOutputKind) -> CompletionOutput:
        sequence, text = completion.sequence, completion.text
        reason = sequence.finish_reason
        if text is not None and reason is not None:
            text.push([], finished=True)  # an abort comes without a last token: what was held back comes out now
        tokens, logprobs = sequence.output_token_ids, sequence.output_logprobs
        if kind is RequestOutputKind.DELTA:
            seen, completion.seen_tokens = completion.seen_tokens, len(tokens)
            shown, tokens = "" if text is None else text.take(), tokens[seen:]
            logprobs = None if logprobs is None else logprobs[seen:]
        else:
            shown = "" if text is None else text.text
        return CompletionOutput(
            sequence.index,
            shown,
            tuple(tokens),
            None if logprobs is None else sequence.cumulative_logprob,
            None if logprobs is None else list(logprobs),
            None if reason is None else str(reason),
            sequence.stop_reason,
        )

    def describe(self, token_ids: list[int], logprobs: list[float], ranks: list[int]) -> TokenLogprobs:
        """One position's candidates as vLLM shows them: token id -> logprob, rank and text."""
        decode = None if self.tokenizer is None else self.tokenizer.token_text
        return {
            token: Logprob(logprob, rank, None if decode is None else decode(token))
            for token, logprob, rank in zip(token_ids, logprobs, ranks, strict=True)
        }


def _embedding(record: RequestRecord) -> tuple[float, ...] | None:
    request, ended_by_itself = record.request, record.completions[0].sequence.finish_reason is FinishReason.STOP
    if request.pooling is None or record.pooled is None or not ended_by_itself:
        return None
    return finish_pooling(record.pooled, request.num_prompt_tokens, request.pooling)


def _metrics(record: RequestRecord) -> RequestMetrics:
    arrival, completions = record.request.arrival_time, record.completions
    if len(completions) == 1 and not completions[0].sequence.accepted_runs:  # made for every token of most requests
        s = completions[0].sequence
        return RequestMetrics(
            arrival,
            arrival,
            s.scheduled_ts,
            s.first_token_ts,
            s.last_token_ts,
            len(s.output_token_ids),
            s.num_preemptions,
        )
    sequences = record.sequences
    num_drafts, num_draft_tokens, num_accepted_tokens, accepted_per_pos = _draft_counts(sequences)
    return RequestMetrics(
        arrival_time=arrival,
        queued_ts=arrival,
        scheduled_ts=min((s.scheduled_ts for s in sequences if s.scheduled_ts is not None), default=None),
        first_token_ts=min((s.first_token_ts for s in sequences if s.first_token_ts is not None), default=None),
        last_token_ts=max((s.last_token_ts for s in sequences if s.last_token_ts is not None), default=None),
        num_generation_tokens=sum(len(s.output_token_ids) for s in sequences),
        num_preemptions=sum(s.num_preemptions for s in sequences),
        num_drafts=num_drafts,
        num_draft_tokens=num_draft_tokens,
        num_accepted_tokens=num_accepted_tokens,
        accepted_per_pos=accepted_per_pos,
    )


def _draft_counts(sequences: Iterable[Sequence]) -> tuple[int, int, int, tuple[int, ...]]:
    """The last four fields of `RequestMetrics`."""
    sequences = tuple(sequences)
    runs = [sum(column) for column in zip_longest(*(s.accepted_runs for s in sequences), fillvalue=0)]
    accepted_per_pos: tuple[int, ...] = ()
    if all(s.finished for s in sequences):
        accepted_per_pos = tuple(sum(runs[place:]) for place in range(1, len(runs)))
    drafted, accepted = sum(s.num_drafted for s in sequences), sum(s.num_accepted for s in sequences)
    return sum(runs), drafted, accepted, accepted_per_pos


def stamp(sequence: Sequence, now: float) -> None:
    """Note the time of a token that was just committed."""
    if sequence.first_token_ts is None:
        sequence.first_token_ts = now
    sequence.last_token_ts = now
