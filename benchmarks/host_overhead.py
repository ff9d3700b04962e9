"""What does the host do in a step, and how long does it take? A device that answers at once leaves nothing else.

    python -m benchmarks.host_overhead

Three questions, all with the real scheduler, block pool, packing, executor, commit and detokenizer (`fake_device.py`):

- decode: microseconds per step by the number of running sequences, one token each, and the tokens scheduled per second
  of one core. At one number of sequences also where the time goes.
- churn: the same while sequences end and others begin: prompts are hashed, blocks and rows change hands.
- exposed: the device takes some milliseconds per step. How long does it wait for the host between two of them?

Not in it: what XLA's own dispatch takes, and what a server does with the outputs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fake_device import FakeDevice, make_core, make_request
from benchmarks.markdown import table
from engine.config import Environment
from engine.core import EngineCore
from engine.text.tokenizer import Tokenizer
from models.loading.resolver import FetchOptions, resolve_model
from serving.bench.machine import machine

MODEL = "demo"  # its tokenizer
TEXT = Path(__file__).parents[1] / "models" / "quantizer" / "texts" / "held_out.txt"
SIZES = (1, 4, 16, 64, 256, 1024)
PROMPT_LEN = 128
CHURN_PROMPT, CHURN_OUTPUT = 256, 128
MOST_TOKENS = 8192  # of a step
WARM_UP = 20
PHASES = ("plan", "pack", "dispatch", "collect", "commit", "detokenize", "outputs", "rest")


@dataclass(frozen=True)
class Cost:
    """Of one step with so many running sequences.

    Attributes:
        num_seqs: that got a token each.
        step_us: median over the steps.
        tokens_per_s: scheduled, by the mean.
        phases_us: phase -> median; {} where it was not asked for. Its sum exceeds `step_us` by what looking costs.
    """

    num_seqs: int
    step_us: float
    tokens_per_s: float
    phases_us: dict[str, float]


@dataclass(frozen=True)
class Churn:
    """While sequences end and begin. `tokens_per_s` counts prompt and output tokens, `step_us` is a mean."""

    num_seqs: int
    step_us: float
    tokens_per_s: float


@dataclass(frozen=True)
class Exposed:
    """A device whose steps take `device_ms`: what a step takes in all, and how long the device waited (means)."""

    num_seqs: int
    device_ms: float
    step_ms: float
    idle_us: float


class Stopwatch:
    """Seconds spent in functions, without what is spent in others that are watched too."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Time a method of an object under a phase's name."""
        setattr(owner, name, self._timed(getattr(owner, name), phase))

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        seconds, inner, clock = self.seconds, self._inner, time.perf_counter
        seconds.setdefault(phase, 0.0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            started = clock()
            try:
                return function(*args, **kwargs)
            finally:
                taken = clock() - started
                seconds[phase] += taken - inner.pop()
                inner[-1] += taken

        return timed


def watch(core: EngineCore) -> Stopwatch:
    """Time the phases of a core's steps."""
    stopwatch = Stopwatch()
    for owner, name, phase in (
        (core, "step", "rest"),
        (core.scheduler, "plan", "plan"),
        (core.executor, "forward", "pack"),
        (core.executor, "sample", "dispatch"),
        (core.executor, "collect", "collect"),
        (core, "_commit", "commit"),
        (core.outputs, "push", "detokenize"),
        (core, "_drain", "outputs"),
    ):
        stopwatch.watch(owner, name, phase)
    return stopwatch


def start(text: np.ndarray, num_seqs: int, num_steps: int, tokenizer: Tokenizer | None, step_s: float = 0.0) -> Any:
    """A core whose sequences all decode, and its device."""
    device = FakeDevice(text)
    core = make_core(device, num_seqs, MOST_TOKENS, PROMPT_LEN + num_steps + 64, tokenizer)
    for number in range(num_seqs):
        core.add(make_request(f"r{number}", _prompt(text, number, PROMPT_LEN), num_steps + 32))
    while any(sequence.num_uncomputed > 1 for sequence in core.scheduler.running) or core.scheduler.num_waiting:
        core.step()
    device.step_s = step_s
    for _ in range(WARM_UP):
        core.step()
    return core, device


def decode(text: np.ndarray, num_seqs: int, num_steps: int, tokenizer: Tokenizer | None, phases: bool) -> Cost:
    """Steps in which each sequence gets one token."""
    core, _ = start(text, num_seqs, num_steps + WARM_UP, tokenizer)
    seconds = [_timed_step(core) for _ in range(num_steps)]
    found: dict[str, float] = {}
    if phases:
        core, _ = start(text, num_seqs, num_steps + WARM_UP, tokenizer)
        stopwatch = watch(core)
        steps = []
        for _ in range(num_steps):
            stopwatch.seconds.update(dict.fromkeys(PHASES, 0.0))
            core.step()
            steps.append(dict(stopwatch.seconds))
        found = {phase: 1e6 * statistics.median(step[phase] for step in steps) for phase in PHASES}
    return Cost(num_seqs, 1e6 * statistics.median(seconds), num_seqs * num_steps / sum(seconds), found)


def churn(text: np.ndarray, num_seqs: int, num_steps: int, tokenizer: Tokenizer | None) -> Churn:
    """Each sequence that ends is followed by another; when the clock starts they are at all stages."""
    device = FakeDevice(text)
    core = make_core(device, num_seqs, MOST_TOKENS, CHURN_PROMPT + CHURN_OUTPUT, tokenizer)
    count = 0
    for number in range(num_seqs):
        core.add(make_request(f"r{count}", _prompt(text, count, CHURN_PROMPT), 1 + number * CHURN_OUTPUT // num_seqs))
        count += 1

    def advance(steps: int) -> float:
        nonlocal count
        spent = 0.0
        for _ in range(steps):
            started = time.perf_counter()
            outputs = core.step()
            spent += time.perf_counter() - started
            for _ended in (output for output in outputs if output.finished):
                request = make_request(f"r{count}", _prompt(text, count, CHURN_PROMPT), CHURN_OUTPUT)
                count += 1
                started = time.perf_counter()
                core.add(request)
                spent += time.perf_counter() - started
        return spent

    advance(CHURN_OUTPUT)
    before = core.stats.num_tokens
    spent = advance(num_steps)
    return Churn(num_seqs, 1e6 * spent / num_steps, (core.stats.num_tokens - before) / spent)


def exposed(text: np.ndarray, num_seqs: int, num_steps: int, tokenizer: Tokenizer | None, device_ms: float) -> Exposed:
    """How long a device waits whose steps take so long."""
    core, device = start(text, num_seqs, num_steps + WARM_UP, tokenizer, device_ms / 1e3)
    gc.collect()
    gc.freeze()  # as a server's engine process does
    device.reset()
    started = time.perf_counter()
    for _ in range(num_steps):
        core.step()
    step_s = (time.perf_counter() - started) / num_steps
    return Exposed(num_seqs, device_ms, 1e3 * step_s, 1e6 * device.idle_s / device.num_steps)


def _prompt(text: np.ndarray, number: int, length: int) -> list[int]:
    start = number * 37 % (len(text) - length)
    return text[start : start + length].tolist()


def _timed_step(core: EngineCore) -> float:
    started = time.perf_counter()
    core.step()
    return time.perf_counter() - started


def markdown(costs: Sequence[Cost], churned: Sequence[Churn], waits: Sequence[Exposed]) -> str:
    """The tables."""
    header = ("running sequences", "µs per step", "µs per token", "tokens/s of one core")
    rows = [
        (str(c.num_seqs), f"{c.step_us:.0f}", f"{c.step_us / c.num_seqs:.2f}", f"{c.tokens_per_s:,.0f}") for c in costs
    ]
    parts = [table(header, rows)]
    watched = [cost for cost in costs if cost.phases_us]
    if watched:
        rows = [(phase, *(f"{cost.phases_us[phase]:.0f}" for cost in watched)) for phase in PHASES] + [
            ("sum, watched", *(f"{sum(cost.phases_us.values()):.0f}" for cost in watched))
        ]
        parts.append(table(("µs per step", *(f"{cost.num_seqs} sequences" for cost in watched)), rows))
    if churned:
        rows = [(str(c.num_seqs), f"{c.step_us:.0f}", f"{c.tokens_per_s:,.0f}") for c in churned]
        parts.append(table(("churn, sequences", "µs per step", "tokens/s of one core"), rows))
    if waits:
        rows = [(f"{w.device_ms:g}", f"{w.step_ms:.3f}", f"{w.idle_us:.0f}") for w in waits]
        parts.append(
            table((f"device, ms per step ({waits[0].num_seqs} sequences)", "ms in all", "device idle, µs"), rows)
        )
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_overhead", description=__doc__)
    parser.add_argument(
        "--sequences", default=",".join(map(str, SIZES)), help="running sequences (default: %(default)s)"
    )
    parser.add_argument("--phases", type=int, default=256, help="sequences of the step that is taken apart")
    parser.add_argument("--steps", type=int, default=200, help="measured steps of each kind (default: %(default)s)")
    parser.add_argument("--device-ms", default="1,2,4,8", help="steps of the slow device (default: %(default)s)")
    parser.add_argument("--only-decode", action="store_true", help="leave churn and the slow device out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local/host-overhead"))
    args = parser.parse_args(argv)
    tokenizer = Tokenizer.load(resolve_model(MODEL, FetchOptions(Environment.read().cache_dir)).path)
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    text = np.array(ids, np.int32)
    sizes = sorted({int(size) for size in args.sequences.split(",")} | {args.phases})
    costs = [decode(text, size, args.steps, tokenizer, phases=size == args.phases) for size in sizes]
    churned, waits = [], []
    if not args.only_decode:
        churned = [churn(text, args.phases, args.steps, tokenizer)]
        waits = [exposed(text, args.phases, args.steps, tokenizer, float(ms)) for ms in args.device_ms.split(",")]
    report = markdown(costs, churned, waits)
    args.out.mkdir(parents=True, exist_ok=True)
    data = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "decode": [asdict(each) for each in costs],
        "churn": [asdict(each) for each in churned],
        "exposed": [asdict(each) for each in waits],
    }
    (args.out / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (args.out / "report.md").write_text(report + "\n", encoding="utf-8")
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
