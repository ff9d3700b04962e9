"""What does a long prompt do to streams that run beside it, with `itl_target_ms` and without?

    python -m benchmarks.itl_target --target-ms 150

Sixteen streams decode. Long prompts arrive, one after another, the next one when the one before has its first token.
Reported are the times between two tokens of each stream, alone and while a prompt is read, and the time to the first
token of the prompts. With a target the first prompt meets an engine that has seen no such step yet. The engine's loop
is driven by hand, as its thread would: no server, no other thread. The driver takes less than a millisecond per step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.markdown import table
from engine.builder import build_engine
from engine.built import BuiltEngine
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.sampling_params import RequestOutputKind, SamplingParams
from serving.bench.machine import machine

STREAM_PROMPT = 64
ALONE_TOKENS = 40  # of each stream, measured before a prompt comes
FIRST_ID = 100  # special tokens come before


@dataclass(frozen=True)
class Window:
    """Times between two tokens of the streams, while something happened.

    Attributes:
        target_ms: of the engine; None = none.
        what: "alone", or which of the prompts was being read.
        num_intervals: how many were seen.
        p50_ms, p99_ms, max_ms: of them.
        first_token_s: of the prompt, from its arrival; None = alone.
        step_tokens: the largest step of the window.
    """

    target_ms: float | None
    what: str
    num_intervals: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    first_token_s: float | None
    step_tokens: int


class Streams:
    """Drives a core, and notes when each stream gets a token."""

    def __init__(self, built: BuiltEngine, num_streams: int, rng: np.random.Generator) -> None:
        self._built, self._core, self._rng = built, built.core, rng
        self._last: dict[str, float] = {}
        for number in range(num_streams):
            self._add(f"stream-{number}", STREAM_PROMPT, 100_000)

    def _add(self, name: str, length: int, num_outputs: int) -> None:
        most = self._built.limits.max_model_len - length
        params = SamplingParams(
            temperature=0.0, max_tokens=min(num_outputs, most), ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        ids = self._rng.integers(FIRST_ID, self._built.model.vocab_size, length).tolist()
        self._core.add(self._built.inputs.make(ids, params, request_id=name))

    def warm_up(self, num_steps: int) -> None:
        """Let the streams begin."""
        for _ in range(num_steps):
            self._core.step()

    def alone(self) -> Window:
        """Nothing else happens."""
        return self._window("alone", lambda count, _: count >= ALONE_TOKENS)

    def beside(self, what: str, length: int) -> Window:
        """A prompt of so many tokens arrives, and gets two tokens."""
        self._add(what, length, 2)
        return self._window(what, lambda _, first: first is not None)

    def _window(self, what: str, done: Callable[[int, float | None], bool]) -> Window:
        started, first, count, intervals, largest = time.perf_counter(), None, 0, [], 0
        self._last.clear()
        while not done(count, first):
            outputs = self._core.step()
            now = time.perf_counter()
            count += 1
            for output in outputs:
                if output.request_id == what and first is None:
                    first = now - started
                if output.request_id.startswith("stream"):
                    if output.request_id in self._last:
                        intervals.append(now - self._last[output.request_id])
                    self._last[output.request_id] = now
            largest = max(largest, newest_step(self._core))
        p50, p99, most = (1e3 * float(np.percentile(intervals, q)) for q in (50, 99, 100))
        target = self._built.config.scheduler.itl_target_ms
        return Window(target, what, len(intervals), p50, p99, most, first, largest)


def newest_step(core: EngineCore) -> int:
    """Tokens of the step that was dispatched last, padding included."""
    steps = core.timeline.recent_steps(0)[-1:]
    return steps[0].padded_tokens if steps else 0


def measure(args: argparse.Namespace, target_ms: float | None) -> list[Window]:
    """All windows of one engine."""
    settings = {"itl_target_ms": target_ms, "max_model_len": args.prompt_len + 1024}
    config = EngineConfig.from_flat(
        model=args.model, max_num_seqs=2 * args.streams, skip_tokenizer_init=True, show_progress=False, **settings
    )
    streams = Streams(build_engine(config), args.streams, np.random.default_rng(0))
    streams.warm_up(8)
    windows = [streams.alone()]
    for number in range(args.prompts):
        windows.append(streams.beside(f"prompt {number + 1}", args.prompt_len))
        print(windows[-1], file=sys.stderr, flush=True)
    return windows


def markdown(windows: Sequence[Window]) -> str:
    """The table."""
    header = ("target, ms", "beside", "ITL p50, ms", "p99", "max", "prompt's first token, s", "largest step, tokens")
    rows = [
        (
            "none" if w.target_ms is None else f"{w.target_ms:g}",
            "nothing" if w.first_token_s is None else w.what,
            *(f"{each:.0f}" for each in (w.p50_ms, w.p99_ms, w.max_ms)),
            "–" if w.first_token_s is None else f"{w.first_token_s:.2f}",
            str(w.step_tokens),
        )
        for w in windows
    ]
    return table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.itl_target", description=__doc__)
    parser.add_argument("--model", default="demo", help="model reference (default: %(default)s)")
    parser.add_argument("--target-ms", type=float, default=150.0, help="of the second engine (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=16, help="that decode (default: %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=4096, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=2, help="that arrive, in turn (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local/itl-target"))
    args = parser.parse_args(argv)
    windows = [window for target in (None, args.target_ms) for window in measure(args, target)]
    report = markdown(windows)
    args.out.mkdir(parents=True, exist_ok=True)
    data = {"date": date.today().isoformat(), "machine": machine(), "windows": [asdict(each) for each in windows]}
    (args.out / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (args.out / "report.md").write_text(report + "\n", encoding="utf-8")
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
