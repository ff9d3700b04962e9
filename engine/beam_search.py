"""Beam search on top of ordinary requests: each round asks one token with logprobs for every live beam.

The prefix cache makes this cheap: a beam's tokens but the last block are in the cache already, and beams share their
    common prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.errors import RequestFailedError
from engine.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from engine.requests.request import Request
from engine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from engine.text.tokenizer import Tokenizer

TOP_LOGPROBS = 20  # what a step returns anyway; wider beams ask for the whole vocabulary

Run = Callable[[list[Request]], list[RequestOutput]]


@dataclass(frozen=True)
class _Beam:
    tokens: tuple[int, ...]
    logprob: float
    stopped: bool = False

    def score(self, prompt_len: int, length_penalty: float) -> float:
        return self.logprob / max(1, len(self.tokens) - prompt_len) ** length_penalty


def beam_search(
    request: Request, params: BeamSearchParams, eos_token_ids: tuple[int, ...], tokenizer: Tokenizer | None, run: Run
) -> BeamSearchOutput:
    """Search one prompt.

    Args:
        request: a validated request; `max_tokens` is already capped to the context.
        params: width, length, penalty.
        eos_token_ids: tokens that complete a beam unless `ignore_eos`.
        run: completes requests, all together.
    """
    width, prompt_len = params.beam_width, request.num_prompt_tokens
    candidates = 2 * width
    one_token = SamplingParams(
        max_tokens=1,
        temperature=params.temperature,
        logprobs=candidates if candidates <= TOP_LOGPROBS else -1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    stops = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
    live, complete = [_Beam(request.prompt_token_ids, 0.0)], []
    for step in range(request.max_tokens):
        grown: list[_Beam] = []
        outputs = run([_continue(request, beam, f"{step}-{i}", one_token) for i, beam in enumerate(live)])
        for beam, output in zip(live, outputs, strict=True):
            if output.error is not None:
                raise RequestFailedError(output.error)
            logprobs = (output.outputs[0].logprobs or [{}])[0]
            best = sorted(logprobs.items(), key=lambda entry: -entry[1].logprob)[:candidates]
            for token, value in best:
                child = _Beam((*beam.tokens, token), beam.logprob + value.logprob, stopped=token in stops)
                (complete if child.stopped else grown).append(child)
        live = sorted(grown, key=lambda b: -b.score(prompt_len, params.length_penalty))[:width]
        if not live:
            break
    ranked = sorted([*complete, *live], key=lambda b: -b.score(prompt_len, params.length_penalty))[:width]
    return BeamSearchOutput([_present(beam, prompt_len, params, tokenizer) for beam in ranked])


def _continue(request: Request, beam: _Beam, name: str, one_token: SamplingParams) -> Request:
    """The request for a beam's next token."""
    request_id = f"{request.request_id}-{name}"
    return replace(request, request_id=request_id, prompt=None, prompt_token_ids=beam.tokens, params=one_token)


def _present(beam: _Beam, prompt_len: int, params: BeamSearchParams, tokenizer: Tokenizer | None) -> BeamSearchSequence:
    silent = 1 if beam.stopped and not params.include_stop_str_in_output else 0
    shown = beam.tokens[prompt_len : len(beam.tokens) - silent]
    return BeamSearchSequence(
        token_ids=beam.tokens,
        text=None if tokenizer is None else tokenizer.decode(shown, skip_special_tokens=True),
        cumulative_logprob=beam.logprob,
        finish_reason="stop" if beam.stopped else "length",
    )
