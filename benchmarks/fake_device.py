"""A device that computes nothing and takes as long as one likes: what is left of a step is the host's own work.

The engine's parts are the real ones: scheduler, block pool, packing, executor, detokenizer. Only the executables are
replaced, by functions that return at once. Their tokens come out of a text, so that the detokenizer has real work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from engine.core import CoreOptions, EngineCore
from engine.output_processor import OutputProcessor
from engine.requests.request import Request
from engine.runtime.compile import COUNTER
from engine.runtime.executables import ModelProgram
from engine.runtime.executor import Executor
from engine.runtime.limits import RuntimeLimits
from engine.runtime.lookup import Executables
from engine.runtime.sampling import SampledTokens, SamplerVariant
from engine.sampling_params import RequestOutputKind, SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.text.tokenizer import Tokenizer
from models.config import LayerConfig, ModelConfig, RopeConfig

BLOCK_SIZE = 16
# The smallest model there can be: only the shapes of the device state are made of it.
MODEL = ModelConfig("llama", 32, 8, 8, 1, 1, 8, 1 << 20, 1e-5, RopeConfig(1e4, 8), (LayerConfig(),), eos_token_ids=(0,))


@dataclass
class FakeDevice:
    """Runs steps one after another, each `step_s` long.

    Attributes:
        text: int32[n], what is sampled: each sequence reads on in it, from a place of its own.
        step_s: seconds of a step; 0 = none.
        idle_s: seconds between two steps during which nothing was queued, since the last `reset`.
        num_steps: since then.
    """

    text: np.ndarray
    step_s: float = 0.0
    idle_s: float = 0.0
    num_steps: int = 0
    busy_until: float = 0.0

    def reset(self) -> None:
        """Forget what was counted."""
        self.idle_s, self.num_steps = 0.0, 0

    def forward(self, num_seqs: int, params: Any, state: Any, known: Any, packed: Any, drafts: Any) -> tuple[Any, ...]:
        """Queue a step."""
        now = time.perf_counter()
        self.idle_s += max(0.0, now - self.busy_until)
        self.busy_until = max(now, self.busy_until) + self.step_s
        self.num_steps += 1
        return None, None, None, state, None

    def sample(self, num_seqs: int, logits: Any, sampling: Any, state: Any) -> tuple[SampledTokens, Any]:
        """The tokens of the step that was queued last."""
        start = self.num_steps % (len(self.text) - num_seqs)
        promise = _Promise(self.text[start : start + num_seqs], self.busy_until if self.step_s else 0.0)
        return SampledTokens(promise), state  # type: ignore[arg-type]

    def executables(self, program: ModelProgram) -> Executables:
        """Every executable that generating needs."""
        compiled: dict[Any, Any] = {"update_tables": lambda state, updates: state}
        for bucket in program.buckets.all():
            compiled["forward", bucket] = partial(self.forward, bucket.num_seqs)
            compiled["pool", bucket.num_tokens] = None  # looked up in each step, called for pooled requests only
            for variant in SamplerVariant:
                compiled["sample", bucket.num_seqs, variant] = partial(self.sample, bucket.num_seqs)
        return Executables(compiled)


class _Promise:
    """An array that is there at a given time."""

    def __init__(self, values: np.ndarray, ready_at: float) -> None:
        self._values, self._ready_at = values, ready_at

    def copy_to_host_async(self) -> None:
        """As a device array's."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._ready_at:
            time.sleep(max(0.0, self._ready_at - time.perf_counter()))
        return self._values


def make_core(
    device: FakeDevice, num_seqs: int, max_num_tokens: int, max_len: int, tokenizer: Tokenizer | None
) -> EngineCore:
    """An engine's core on the fake device, with room for so many sequences of so many tokens."""
    limits = RuntimeLimits(num_seqs, max(max_num_tokens, num_seqs), max_len, BLOCK_SIZE, "float32", "float32")
    program = ModelProgram.of(MODEL, limits, 2)
    scheduling = SchedulerLimits(
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=max_len,
        block_size=BLOCK_SIZE,
    )
    pool = BlockPool(num_seqs * limits.max_blocks_per_seq + 1)
    with COUNTER.building():  # the device state is made by small executables of its own
        executor = Executor(program, (), device.executables(program))  # type: ignore[arg-type]
    return EngineCore(Scheduler(scheduling, pool), executor, OutputProcessor(tokenizer), CoreOptions(overlap=True))


def make_request(name: str, prompt: Sequence[int], num_outputs: int) -> Request:
    """A request as the server makes them: it wants each new piece of text as it comes."""
    params = SamplingParams(
        temperature=0.0, max_tokens=num_outputs, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    return Request(name, None, tuple(prompt), params, (), (), 0, 0, None, time.monotonic())
