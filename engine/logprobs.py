"""Log-probabilities on their way from a step's result into the records of sequences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from engine.outputs import TokenLogprobs
from engine.requests.sequence import Sequence
from engine.runtime.executor import PromptScore, StepResult, needs_full_logprobs

Describe = Callable[[list[int], list[float], list[int]], TokenLogprobs]
"""(token ids, logprobs, ranks) -> one position as users see it."""


def add_logprobs(sequence: Sequence, token: int, row: int, result: StepResult, describe: Describe) -> None:
    """Add the candidates for a token that a sequence got, of the sampler's row `row`."""
    asked = sequence.request.params.logprobs
    assert asked is not None and sequence.output_logprobs is not None
    sampled = result.sampled.logprobs
    assert sampled is not None, "a request with logprobs makes the sampler's variant FULL"
    chosen, rank = float(sampled.logprob[row]), int(sampled.rank[row])
    if needs_full_logprobs(asked):
        assert result.full_logprobs is not None
        candidates = _candidates(result.full_logprobs[row], asked)
    else:
        candidates = (sampled.top_ids[row, :asked].tolist(), sampled.top_logprobs[row, :asked].tolist())
    sequence.output_logprobs.append(_position(token, chosen, rank, *candidates, describe))
    sequence.cumulative_logprob += chosen


def add_prompt_score(score: PromptScore, describe: Describe) -> None:
    """Add the candidates for the prompt tokens that a step scored."""
    sequence = score.sequence
    known, asked = sequence.prompt_logprobs, sequence.request.params.prompt_logprobs
    assert known is not None and asked is not None
    scores = score.scores
    for offset in range(score.count):
        position = score.first + offset
        if position != len(known):
            continue  # computed again after a preemption
        token = sequence.request.prompt_token_ids[position]
        if score.full is not None:
            candidates = _candidates(np.asarray(score.full[offset]), asked)
        else:
            candidates = (scores.top_ids[offset, :asked].tolist(), scores.top_logprobs[offset, :asked].tolist())
        logprob, rank = float(scores.logprob[offset]), int(scores.rank[offset])
        known.append(_position(token, logprob, rank, *candidates, describe))


def _position(
    token: int, logprob: float, rank: int, top: list[int], top_logprobs: list[float], describe: Describe
) -> TokenLogprobs:
    """The candidates of one position, the chosen token first, as vLLM orders them."""
    tokens, logprobs, ranks = [token], [logprob], [rank]
    for place, (candidate, value) in enumerate(zip(top, top_logprobs, strict=True), start=1):
        if candidate != token and value != -math.inf:  # what a grammar forbids is no candidate
            tokens.append(candidate)
            logprobs.append(value)
            ranks.append(place)
    return describe(tokens, logprobs, ranks)


def _candidates(logprobs: np.ndarray, asked: int) -> tuple[list[int], list[float]]:
    """The `asked` most probable tokens (-1 = all) of float32[V], best first."""
    order = np.argsort(-logprobs, kind="stable")[: None if asked == -1 else asked]
    return order.tolist(), logprobs[order].tolist()
