"""Quire's engine: requests in, tokens out.

The problem: many requests of different lengths, one device that wants big fixed-shape batches. The idea: every sequence
has known tokens and computed tokens, and one loop gives each some tokens per step so that computed catches up with
known; chunked prefill, prefix caching, preemption and drafts are that loop, not features beside it. Data flow: prompt
-> `Request` -> `Scheduler.plan()` -> `StepPlan` -> `Executor` (packed array, jitted step) -> `Scheduler.commit()` ->
text -> `RequestOutput`.

Deliberately not here: HTTP and JSON (`serving`), what a model is (`models`), how an operation runs (`pallas_kernels`).

`Engine` and `AsyncEngine` are imported on first use: the configuration alone (command line help, say) needs no jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.outputs import BeamSearchOutput, CompletionOutput, EmbeddingOutput, Logprob, RequestOutput
from engine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from engine.structured.params import StructuredOutputsParams

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine
    from engine.engine import Engine

__all__ = [
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingOutput",
    "Engine",
    "EngineConfig",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from engine.engine import Engine

        return Engine
    if name == "AsyncEngine":
        from engine.async_engine import AsyncEngine

        return AsyncEngine
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
