"""Run one repetition of a workload and take its times."""

from __future__ import annotations

import time
from dataclasses import dataclass

from engine.outputs import RequestOutput
from engine.sampling_params import RequestOutputKind, SamplingParams
from serving.backend import EngineLike
from serving.bench.workloads import BenchRequest, Repetition
from serving.errors import MeasurementError
from serving.timing import Timing


@dataclass(frozen=True)
class Measured:
    """What one repetition took.

    Attributes:
        elapsed_s: from the first request sent to the last completion, in seconds.
        num_prompt_tokens, num_output_tokens: over all requests.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        timings: the speed of each request, in order.
        decode_tokens_per_s: tokens of all requests after their first, per second between the first token of all and the
            last; None if each request has only one. The prefill of late requests lies inside this time.
    """

    elapsed_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    timings: list[Timing]
    decode_tokens_per_s: float | None


def run_repetition(engine: EngineLike, repetition: Repetition, *, detokenize: bool) -> Measured:
    """Send all requests of a repetition at once and wait for all of them.

    Raises:
        MeasurementError: a request failed, or has another number of tokens than it was to have.
    """
    prompts: list[str | list[int]] = [request.prompt_token_ids for request in repetition]
    params = [_params(request, detokenize) for request in repetition]
    start = time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    elapsed_s = time.perf_counter() - start
    for request, output in zip(repetition, outputs, strict=True):
        _check(request, output)
    return Measured(
        elapsed_s=elapsed_s,
        num_prompt_tokens=sum(len(request.prompt_token_ids) for request in repetition),
        num_output_tokens=sum(request.output_len for request in repetition),
        num_cached_tokens=sum(output.num_cached_tokens for output in outputs),
        timings=[Timing.of(output) for output in outputs],
        decode_tokens_per_s=_decode_rate(repetition, outputs),
    )


def _params(request: BenchRequest, detokenize: bool) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,
        ignore_eos=True,
        max_tokens=request.output_len,
        detokenize=detokenize,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _check(request: BenchRequest, output: RequestOutput) -> None:
    if output.error is not None:
        raise MeasurementError(f"request {output.request_id} failed: {output.error}")
    got = len(output.outputs[0].token_ids)
    if got != request.output_len:
        reason = output.outputs[0].finish_reason
        raise MeasurementError(
            f"request {output.request_id} (prompt of {len(request.prompt_token_ids)} tokens) ended after {got} tokens "
            f"({reason}) instead of {request.output_len}; is max_model_len long enough?"
        )


def _decode_rate(repetition: Repetition, outputs: list[RequestOutput]) -> float | None:
    first = [
        o.metrics.first_token_ts for o in outputs if o.metrics is not None and o.metrics.first_token_ts is not None
    ]
    last = [o.metrics.last_token_ts for o in outputs if o.metrics is not None and o.metrics.last_token_ts is not None]
    later_tokens = sum(request.output_len - 1 for request in repetition)
    if not first or not last or later_tokens == 0 or max(last) <= min(first):
        return None
    return later_tokens / (max(last) - min(first))
