"""One start, timed: what a child process of `quire bench startup` runs. It prints one line of JSON and ends.

The process should be as fresh as a user's: nothing heavy is imported before its time is taken. Times are of
`time.monotonic`, which Linux has one of for all processes, so the parent can say when it asked for this one.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from engine.sampling_params import SamplingParams

PROMPT = "The capital of France is"
MODULE = "import time; started = time.monotonic(); from engine.startup import main; main(started)"
"""What the child runs: `python -c MODULE SPAWNED SETTINGS`."""

# What JAX says of each compilation -> its name in the result.
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_s",
    "/jax/core/compile/backend_compile_duration": "compile_or_load_s",
    "/jax/compilation_cache/cache_retrieval_time_sec": "cache_load_s",
}


@dataclass
class Clock:
    """Seconds of each stage, in order; a stage ends where the next one is marked."""

    last: float
    stages: dict[str, float] = field(default_factory=dict)

    def mark(self, stage: str) -> None:
        """A stage is over."""
        now = time.monotonic()
        self.stages[stage] = now - self.last
        self.last = now


def main(started: float) -> None:
    """Start an engine, generate a token, print a report.

    Args:
        started: when the interpreter ran its first line.
    """
    spawned, settings = float(sys.argv[1]), json.loads(sys.argv[2])
    clock = Clock(spawned)
    clock.stages["interpreter"], clock.last = started - spawned, started
    clock.mark("settings")
    # What these two imports cost is what is measured.
    import jax

    clock.mark("import jax")
    from engine.engine import Engine

    clock.mark("import engine")
    sums, counts = dict.fromkeys(EVENTS.values(), 0.0), dict.fromkeys(EVENTS.values(), 0)

    def add(event: str, duration_secs: float, **_: Any) -> None:
        name = EVENTS.get(event)
        if name is not None:
            sums[name] += duration_secs
            counts[name] += 1

    jax.monitoring.register_event_duration_secs_listener(add)
    engine = Engine(**settings)
    described = engine.describe()
    clock.mark("rest")
    for stage, seconds in described["start_s"].items():
        clock.stages[stage] = seconds
        clock.stages["rest"] -= seconds
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    prompt = {"prompt_token_ids": [1, 2, 3, 4, 5]} if engine.get_tokenizer() is None else PROMPT
    [output] = engine.generate(prompt, params)
    clock.mark("first token")
    ready = clock.last
    engine.shutdown()
    report = {
        "stages": clock.stages,
        "first_token_s": ready - spawned,
        "jax": {"seconds": sums, "counts": counts},
        "num_executables": described["num_executables"],
        "device": described["device"],
        "dtype": described["dtype"],
        "implementations": described["implementations"],
        "token_ids": list(output.outputs[0].token_ids),
    }
    print(json.dumps(report))
