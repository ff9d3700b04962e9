"""A process from its start to its first token, by stage; prints one JSON line.

    python -m benchmarks.gpu.first_token STARTED_AT SETTINGS

STARTED_AT is `time.time()` of the moment before the process was started, SETTINGS the engine's, as JSON.
"""

from __future__ import annotations

import time

_INTERPRETER_AT = time.time()

import json  # noqa: E402 - the moment above comes before all other imports
import sys  # noqa: E402
from collections import Counter  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402

from engine.engine import Engine  # noqa: E402
from engine.sampling_params import SamplingParams  # noqa: E402

_IMPORTED_AT = time.time()
PROMPT = list(range(3, 19))
# Seconds over all threads, hence more than the wall time of compiling.
STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_s",
    "/jax/core/compile/backend_compile_duration": "backend_s",
    "/jax/compilation_cache/cache_retrieval_time_sec": "cache_read_s",
}
EVENTS = {"/jax/compilation_cache/cache_hits": "cache_hits", "/jax/compilation_cache/cache_misses": "cache_misses"}


def main() -> None:
    """Start an engine, generate one token, print what took how long."""
    started_at, settings = float(sys.argv[1]), json.loads(sys.argv[2])
    seconds: dict[str, float] = dict.fromkeys(STAGES.values(), 0.0)
    counts: Counter[str] = Counter()

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        if event in STAGES:
            seconds[STAGES[event]] += duration_secs

    def on_event(event: str, **_: Any) -> None:
        if event in EVENTS:
            counts[EVENTS[event]] += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    jax.devices()
    device_at = time.time()
    engine = Engine(**settings)
    built_at = time.time()
    engine.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False))
    first_token_at = time.time()
    about = engine.describe()
    result = {
        "total_s": first_token_at - started_at,
        "interpreter_s": _INTERPRETER_AT - started_at,
        "import_s": _IMPORTED_AT - _INTERPRETER_AT,
        "device_s": device_at - _IMPORTED_AT,
        **{f"{stage}_s": value for stage, value in about["start_s"].items()},
        "build_s": built_at - device_at,
        "first_token_s": first_token_at - built_at,
        "num_executables": about["num_executables"],
        "over_all_threads": seconds,
        **counts,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
