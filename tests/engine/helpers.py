"""Golden models, engines that tests share, and a loop that drives a core by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.built import BuiltEngine
from engine.core import EngineCore
from engine.engine import Engine
from engine.input_processor import InputProcessor
from engine.outputs import CompletionOutput, RequestOutput
from engine.requests.request import Request
from engine.scheduling.block_pool import BlockPool

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "tiny"
TINY_NAMES = sorted(path.name for path in TINY.iterdir() if (path / "config.json").is_file())
VOCAB = 320  # of every tiny golden model
MOST_STEPS = 20_000  # a loop that goes on longer than any test needs is a loop that hangs

# Few and small buckets: an engine of a tiny model starts in a second once its executables are in the tests' cache. What
# decides their shapes is the same for nearly all tests (of the sampler's, `max_num_seqs`), so that they are shared.
SMALL: Mapping[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 256,
    "show_progress": False,
}

# All prompts together in steps of at most 16 tokens: the long ones are computed in chunks beside decoding ones.
GOLDEN_SETTINGS: Mapping[str, Any] = {
    "skip_tokenizer_init": True,
    "max_num_batched_tokens": 16,
    "max_logprobs": -1,
}


@dataclass(frozen=True)
class GoldenPrompt:
    """One prompt of a golden file: int32 ids, the greedy continuation, float32 logprobs of all tokens but the first."""

    prompt: list[int]
    continuation: list[int]
    logprobs: np.ndarray


@cache
def golden_prompts(directory: Path) -> tuple[GoldenPrompt, ...]:
    """The prompts of a golden model; of the one that it borrows from, if it has none of its own."""
    golden = json.loads((directory / "golden.json").read_text())
    if "golden_of" in golden:
        return golden_prompts(directory.parent / golden["golden_of"])
    with np.load(directory / golden["arrays"]) as arrays:
        return tuple(
            GoldenPrompt(arrays[f"prompt_{i}"].tolist(), arrays[f"continuation_{i}"].tolist(), arrays[f"logprobs_{i}"])
            for i in range(len(golden["prompts"]))
        )


def parts_of(engine: Engine) -> BuiltEngine:
    """What an engine is built from: tests look, and step, where users have no business."""
    return engine._parts


def core_of(engine: Engine) -> EngineCore:
    """The core of an engine."""
    return engine._parts.core


def inputs_of(engine: Engine) -> InputProcessor:
    """The input processor of an engine."""
    return engine._parts.inputs


def pool_of(core: EngineCore) -> BlockPool:
    """The block pool of a core."""
    return core.scheduler._allocator.pool


def require_idle(core: EngineCore) -> None:
    """Prove that nothing is left of any request: none live, no row owned, every block free.

    Raises:
        AssertionError: with what leaked.
    """
    scheduler = core.scheduler
    assert not scheduler.has_work, f"{scheduler.num_running} sequences run and {scheduler.num_waiting} wait"
    for _ in range(3):  # steps in flight whose tokens nobody wants any more
        core.step()
    assert not core.has_work and scheduler.num_in_flight == 0
    scheduler.check_invariants()
    pool = pool_of(core)
    assert pool.num_free == pool.num_usable, f"{pool.num_usable - pool.num_free} blocks leaked"


def drive(
    core: EngineCore, arrivals: Iterable[tuple[int, Request]], aborts: Mapping[str, int] | None = None
) -> dict[str, RequestOutput]:
    """Step a core until all requests are finished; checks the scheduler's invariants on the way.

    Args:
        core: idle; its requests have output kind FINAL_ONLY.
        arrivals: (step before which the request is added, request), ascending.
        aborts: request id -> step before which the request is aborted, if it is still there.

    Returns:
        request id -> final output.
    """
    waiting, outputs = list(arrivals), {}
    for step in range(MOST_STEPS):
        while waiting and waiting[0][0] <= step:
            core.add(waiting.pop(0)[1])
        for request_id, at in (aborts or {}).items():
            if at == step:
                core.abort(request_id)
        if not waiting and not core.has_work:
            return outputs
        for output in core.step():
            assert output.finished and output.request_id not in outputs
            outputs[output.request_id] = output
        if step % 8 == 0:
            core.scheduler.check_invariants()
    raise AssertionError(f"not finished after {MOST_STEPS} steps")


def tokens_of(output: RequestOutput) -> list[tuple[tuple[int, ...], str | None, int | str | None]]:
    """Tokens, finish reason and stop reason of each completion."""
    return [(c.token_ids, c.finish_reason, c.stop_reason) for c in output.outputs]


def chosen_logprobs(completion: CompletionOutput) -> np.ndarray:
    """float64[n], the logprobs of the sampled tokens."""
    assert completion.logprobs is not None
    return np.array([p[t].logprob for p, t in zip(completion.logprobs, completion.token_ids, strict=True)])


def prompt_logprobs(output: RequestOutput) -> np.ndarray:
    """float64[n - 1], the logprobs of the prompt's tokens but the first."""
    assert output.prompt_logprobs is not None
    known = output.prompt_logprobs[1:]
    return np.array([p[t].logprob for p, t in zip(known, output.prompt_token_ids[1:], strict=True) if p is not None])


def random_ids(rng: np.random.Generator, length: int) -> list[int]:
    """Token ids of a tiny golden model; not the special ones at the beginning."""
    return rng.integers(3, VOCAB, length).tolist()


def largest_difference(left: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray) -> float:
    """The largest absolute difference of two equally long vectors."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    assert left.shape == right.shape
    return float(np.abs(left - right).max(initial=0.0))
