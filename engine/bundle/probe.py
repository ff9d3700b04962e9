"""What a bundle is asked at every start: what is wrong with weights, executables or device shows in the answer."""

from __future__ import annotations

from engine.built import BuiltEngine
from engine.bundle.manifest import Probe
from engine.errors import BundleError
from engine.metrics import EngineStats
from engine.sampling_params import SamplingParams
from engine.timeline import Timeline

PROMPT_TOKENS, ANSWER_TOKENS = 40, 4  # a prompt that runs in the shape that a first request's does
_STRIDE = 7919  # a prime: ids from all over the vocabulary
TOLERANCE = 0.02  # of a logprob; the same executables on the same device differ by rounding of sums at most


def probe_prompt(built: BuiltEngine) -> list[int]:
    """Token ids that are always the same for a model and its limits."""
    length = min(PROMPT_TOKENS, built.limits.max_model_len - ANSWER_TOKENS)
    return [(index + 1) * _STRIDE % built.model.vocab_size for index in range(max(1, length))]


def ask(built: BuiltEngine, prompt: list[int]) -> Probe:
    """What the model says, greedily. Leaves no trace in counters, timeline and prefix cache.

    Raises:
        BundleError: the step failed.
    """
    core, tokens = built.core, min(ANSWER_TOKENS, built.limits.max_model_len - len(prompt))
    params = SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        skip_reading_prefix_cache=True,
    )
    core.add(built.inputs.make(prompt, params, request_id="quire-probe"))
    outputs = []
    while core.has_work:
        outputs += core.step()
    core.scheduler.reset_prefix_cache()
    core.stats, core.timeline = EngineStats(), Timeline()
    last = outputs[-1]
    if last.error is not None:
        raise BundleError(f"the probe failed: {last.error}")
    completion = last.outputs[0]
    assert completion.logprobs is not None
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return Probe(prompt, list(completion.token_ids), [position[token].logprob for token, position in pairs])


def compare(expected: Probe, found: Probe) -> str | None:
    """How an answer differs from the one that the bundle was made with; None if it does not."""
    if found.token_ids != expected.token_ids:
        return f"it answered {found.token_ids} and should have answered {expected.token_ids}"
    worst = max(abs(a - b) for a, b in zip(found.logprobs, expected.logprobs, strict=True))
    return None if worst <= TOLERANCE else f"a log-probability is off by {worst:.3f}"
