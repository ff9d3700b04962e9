"""What does HTTP cost? The same requests through `Engine.generate` and through a server, in turn, in one run.

    python -m benchmarks.serving_overhead

64 requests at a time, streamed, greedy, exact output lengths; each repetition has prompts of its own. Prints the output
tokens per second of both, their ratio, and the CPU seconds that the server's HTTP process, its engine's process and the
client took. The client shares the cores with what it measures: a remote one would not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.server_process import ServerProcess, cpu_s, descendants, server_process
from engine import Engine, SamplingParams
from serving.bench.machine import machine
from serving.bench.serve_client import COMPLETIONS, Target, run_requests
from serving.bench.serve_requests import RandomLengths, ServeRequest, ids_prompt

FIRST_ID = 100  # special tokens come before
MODEL = "demo"


@dataclass(frozen=True)
class Turn:
    """One repetition.

    Attributes:
        offline_s, server_s: time for all requests.
        num_output_tokens: of all requests; the same both ways.
        offline_cpu_s: CPU seconds of the process that ran `Engine.generate`.
        http_cpu_s, engine_cpu_s, client_cpu_s: CPU seconds of the three sides of the server's run.
    """

    offline_s: float
    server_s: float
    num_output_tokens: int
    offline_cpu_s: float
    http_cpu_s: float
    engine_cpu_s: float
    client_cpu_s: float

    @property
    def ratio(self) -> float:
        """Throughput of the server over that of `Engine.generate`."""
        return self.offline_s / self.server_s


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_overhead", description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local/serving-overhead"))
    args = parser.parse_args(argv)
    settings = {
        "max_model_len": 512,
        "max_num_seqs": args.streams,
        "max_num_batched_tokens": 512,
        "num_gpu_blocks_override": args.streams * 32 + 1,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    log = args.out / "server.log"
    with Engine(MODEL, **settings) as engine, server_process(MODEL, [*flags, "--no-request-log"], log) as server:
        turns = [_turn(engine, server, args, number) for number in range(args.repetitions + 1)][1:]
    facts = {"date": date.today().isoformat(), "machine": machine(), "settings": settings, "streams": args.streams}
    args.out.mkdir(parents=True, exist_ok=True)
    data = {"facts": facts, "turns": [asdict(turn) for turn in turns]}
    (args.out / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    report = markdown(turns, facts)
    (args.out / "report.md").write_text(report, encoding="utf-8")
    print(report)
    return 0


def _turn(engine: Engine, server: ServerProcess, args: argparse.Namespace, number: int) -> Turn:
    """Both ways, the order changing with the number; number 0 is warm-up."""
    vocab_size = engine.describe()["vocab_size"]
    lengths = RandomLengths(args.input_len, args.output_len, 0.5)
    requests = lengths.requests(args.streams, f"overhead/{number}", ids_prompt(vocab_size, FIRST_ID))
    measured: dict[str, Any] = {}
    for way in (_offline, _through_server)[:: 1 if number % 2 else -1]:
        measured |= way(engine, server, requests)
        time.sleep(1.0)
    turn = Turn(num_output_tokens=sum(request.output_len for request in requests), **measured)
    print(f"repetition {number}: offline {turn.offline_s:.2f} s, server {turn.server_s:.2f} s, ratio {turn.ratio:.3f}")
    return turn


def _offline(engine: Engine, _: ServerProcess, requests: Sequence[ServeRequest]) -> dict[str, float]:
    params = [SamplingParams(temperature=0.0, max_tokens=r.output_len, ignore_eos=True) for r in requests]
    started, cpu = time.perf_counter(), time.process_time()
    outputs = engine.generate([list(r.prompt) for r in requests], params)
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
    for output, request in zip(outputs, requests, strict=True):
        if len(output.outputs[0].token_ids) != request.output_len:
            raise SystemExit("Engine.generate gave another number of tokens than it was asked for")
    return {"offline_s": elapsed, "offline_cpu_s": cpu}


def _through_server(_: Engine, server: ServerProcess, requests: Sequence[ServeRequest]) -> dict[str, float]:
    http, *workers = descendants(server.process.pid)
    before = cpu_s(http), sum(map(cpu_s, workers))
    target = Target(server.base_url, COMPLETIONS, MODEL)
    run = asyncio.run(run_requests(target, requests, [0.0] * len(requests)))
    if failed := [trace.error for trace in run.traces if trace.error is not None]:
        raise SystemExit(f"{len(failed)} requests failed, the first with: {failed[0]}")
    return {
        "server_s": run.duration_s,
        "http_cpu_s": cpu_s(http) - before[0],
        "engine_cpu_s": sum(map(cpu_s, workers)) - before[1],
        "client_cpu_s": run.client_cpu_s,
    }


def markdown(turns: Sequence[Turn], facts: dict[str, Any]) -> str:
    """The report."""

    def median(values: Sequence[float], digits: int) -> str:
        low, high = min(values), max(values)
        return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"

    outputs = turns[0].num_output_tokens
    rows = [
        ["`Engine.generate`, output tok/s", median([t.num_output_tokens / t.offline_s for t in turns], 0)],
        ["server, output tok/s", median([t.num_output_tokens / t.server_s for t in turns], 0)],
        ["ratio", median([t.ratio for t in turns], 3)],
        ["CPU s: `Engine.generate`", median([t.offline_cpu_s for t in turns], 2)],
        ["CPU s: engine process", median([t.engine_cpu_s for t in turns], 2)],
        ["CPU s: HTTP process", median([t.http_cpu_s for t in turns], 2)],
        ["CPU s: client", median([t.client_cpu_s for t in turns], 2)],
        ["µs of the HTTP process per token", median([1e6 * t.http_cpu_s / t.num_output_tokens for t in turns], 1)],
    ]
    heading = (
        f"# Server beside Engine.generate, {facts['date']}\n\n{facts['machine']['processor']}, "
        f"{facts['machine']['cpu_count']} cores; {MODEL}, {facts['streams']} streams at a time, about {outputs} output "
        f"tokens a repetition, {len(turns)} repetitions in turn after a warm-up. Median (lowest–highest)."
    )
    return f"{heading}\n\n{table(('figure', 'value'), rows)}\n"


if __name__ == "__main__":
    sys.exit(main())
