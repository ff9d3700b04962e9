"""What does speculative decoding gain? Each method beside the same engine without it, in turn, in one process.

    python -m benchmarks.speculative                # ngram and suffix, float32
    python -m benchmarks.speculative --method ngram --method '{"method": "ngram", "num_speculative_tokens": 8}'
    python -m benchmarks.speculative --method @DRAFT.json --adaptive off --dtype bfloat16 --streams 1,64
    python -m benchmarks.speculative --quick        # does everything work? (no measurement)

Greedy, exact output lengths, no prefix cache. A cell is a workload (`workloads/speculation.py`) with so many requests
at a time; with less than eight of them (`--requests`), eight requests are made in turn. Its figure is the time without
drafts over the time with them, prompts included, and the median over the repetitions. Repetition 0 is for warming up.
Each repetition asks something else, and has a cache salt of its own: what suffix decoding remembers is of the same
repetition.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import speculative_report
from benchmarks.speculative_report import Cell, Turn
from benchmarks.workloads.speculation import NUM_CHATS, WORKLOADS
from engine import Engine, SamplingParams
from engine.input_processor import Prompt
from engine.outputs import RequestOutput
from serving.bench.machine import machine

DEFAULT_METHODS = ("ngram", "suffix")
DEFAULT_DRAFTS = 7  # with the known token eight rows: on a CPU they take as long as six
MAX_MODEL_LEN = 512
LONGEST_VALUE = 16  # of a setting in the name of a lane


@dataclass(frozen=True)
class _Run:
    """Of one engine: seconds in all, and of decoding only."""

    seconds: float
    decode_s: float
    outputs: list[RequestOutput]

    @classmethod
    def joined(cls, runs: Sequence[_Run]) -> _Run:
        """Of batches, one after another."""
        outputs = [output for run in runs for output in run.outputs]
        return cls(sum(run.seconds for run in runs), sum(run.decode_s for run in runs), outputs)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write `results.json`, `report.md` and `speedup.png`, and print the report.

    Returns:
        0.
    """
    args = _arguments(argv)
    facts = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "model": args.model,
        "repetitions": args.repetitions,
        "quick": args.quick,
    }
    cells = _earlier_cells(args.out) if args.add else []
    for dtype in args.dtype.split(","):
        for cell in _measure_dtype(dtype, args):
            cells = [*(other for other in cells if other.place != cell.place), cell]
            cells.sort(key=lambda cell: cell.place)
            _write(args.out, facts, cells)  # what is measured is kept, whatever comes later
            speedup = speculative_report.speedup(cell)
            print(f"{dtype} {cell.lane} {cell.workload} x{cell.streams}: {speedup.median:.2f}", flush=True)
    print(_write(args.out, facts, cells))
    speculative_report.draw(cells, facts, args.out / "speedup.png")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculative", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--method", action="append", help="a name, a JSON object or @FILE; may be repeated (default: ngram, suffix)")
    add("--adaptive", choices=("on", "off", "both"), default="both", help="default: %(default)s")
    add("--workload", default="copy,open", help="default: %(default)s")
    add("--streams", default="1,4,16,64", help="requests at a time, at most 64 (default: %(default)s)")
    add("--dtype", default="float32", help="default: %(default)s")
    add("--model", default="demo", help="one with a chat template (default: %(default)s)")
    add("--repetitions", type=int, default=3, help="after the warm-up (default: %(default)s)")
    add("--requests", type=int, default=8, help="fewest of a cell (default: %(default)s)")
    add("--add", action="store_true", help="keep what --out has, but for cells that are measured again")
    add("--quick", action="store_true", help="one repetition, two streams at most, short answers")
    add("--out", type=Path, default=Path("benchmarks/results/local/speculative"))
    args = parser.parse_args(argv)
    if args.quick:
        args.repetitions, args.streams, args.adaptive = 1, "1,2", "off"
    return args


def lanes(methods: Sequence[str], adaptive: str) -> dict[str, dict[str, Any]]:
    """What is measured: a name -> `speculative_config`.

    Args:
        methods: names, JSON objects or @FILEs.
        adaptive: "on", "off" or "both".
    """
    found: dict[str, dict[str, Any]] = {}
    for text in methods:
        text = Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text
        config = json.loads(text) if text.lstrip().startswith("{") else {"method": text}
        config.setdefault("num_speculative_tokens", DEFAULT_DRAFTS)
        others = {k: v for k, v in config.items() if k not in ("method", "num_speculative_tokens", "adaptive")}
        parts = [f"{config['method']} k={config['num_speculative_tokens']}"]
        parts += [f"{key}={value if len(str(value)) <= LONGEST_VALUE else '…'}" for key, value in others.items()]
        for on in (True, False):
            if adaptive == "both" or on == (adaptive == "on"):
                name = " ".join(parts) + (", adaptive" if on else ", always")
                if name in found:
                    name += f" #{len(found)}"
                found[name] = {**config, "adaptive": on}
    return found


def _measure_dtype(dtype: str, args: argparse.Namespace) -> Iterator[Cell]:
    streams = [int(part) for part in args.streams.split(",")]
    if max(streams) > NUM_CHATS:
        raise SystemExit(f"--streams: there are {NUM_CHATS} chats, {max(streams)} were asked for")
    configs = lanes(args.method or DEFAULT_METHODS, args.adaptive)
    most_rows = max(streams) * (1 + max(config["num_speculative_tokens"] for config in configs.values()))
    settings = {
        "dtype": dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": max(streams),
        "max_num_batched_tokens": max(512, most_rows),
        "enable_prefix_caching": False,
        "num_gpu_blocks_override": max(streams) * MAX_MODEL_LEN // 16 + 1,
        "show_progress": False,
    }
    with Engine(args.model, **settings) as plain:
        for lane, config in configs.items():
            with Engine(args.model, **settings, speculative_config=json.dumps(config)) as guessing:
                for workload in args.workload.split(","):
                    for count in streams:
                        turns = [
                            _turn((plain, guessing), workload, count, number, args)
                            for number in range(args.repetitions + 1)
                        ]
                        yield Cell(dtype, lane, workload, count, turns[1:])


def _turn(engines: tuple[Engine, Engine], workload: str, streams: int, number: int, args: argparse.Namespace) -> Turn:
    """Both engines batch by batch, the order changing each time: load from elsewhere meets both alike."""
    chosen = WORKLOADS[workload]
    num_requests = streams if args.quick else max(streams, args.requests)
    output_len = 8 if args.quick else chosen.output_len
    messages = chosen.messages(number)[:num_requests]
    salt = f"{workload}/{streams}/{number}"
    runs: dict[int, list[_Run]] = {0: [], 1: []}
    for start in range(0, num_requests, streams):
        batch = [
            engines[0].apply_chat_template([{"role": "user", "content": text}])
            for text in messages[start : start + streams]
        ]
        for index in (0, 1) if (number + start // streams) % 2 else (1, 0):
            runs[index].append(_run(engines[index], batch, output_len, salt))
    return _compare(*(_Run.joined(runs[index]) for index in (0, 1)))


def _run(engine: Engine, batch: Sequence[list[int]], output_len: int, salt: str) -> _Run:
    """All of a batch at once."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output_len, detokenize=False)
    prompts: list[Prompt] = [{"prompt_token_ids": ids, "cache_salt": salt} for ids in batch]
    compiled = engine.metrics()["compiles_after_ready"]
    started = time.perf_counter()
    outputs = engine.generate(prompts, params)
    seconds = time.perf_counter() - started
    if engine.metrics()["compiles_after_ready"] != compiled:
        raise SystemExit("executables were compiled during a measured run")
    for output in outputs:
        if output.error is not None or len(output.outputs[0].token_ids) != output_len:
            raise SystemExit(f"a request gave another number of tokens than it was asked for: {output.error}")
    return _Run(seconds, _decode_s(outputs), outputs)


def _decode_s(outputs: Sequence[RequestOutput]) -> float:
    """From the moment when all had their first token to the last token of all."""
    every = [output.metrics for output in outputs if output.metrics is not None]
    first, last = [m.first_token_ts for m in every], [m.last_token_ts for m in every]
    return max(ts for ts in last if ts is not None) - max(ts for ts in first if ts is not None)


def _compare(plain: _Run, guessing: _Run) -> Turn:
    accepted: list[int] = []
    num_drafts = num_draft_tokens = 0
    for output in guessing.outputs:
        assert output.metrics is not None
        metrics = output.metrics
        num_drafts += metrics.num_drafts
        num_draft_tokens += metrics.num_draft_tokens
        accepted += [0] * (len(metrics.accepted_per_pos) - len(accepted))
        for place, count in enumerate(metrics.accepted_per_pos):
            accepted[place] += count
    pairs = zip(plain.outputs, guessing.outputs, strict=True)
    same = [a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in pairs]
    return Turn(
        plain_s=plain.seconds,
        guessing_s=guessing.seconds,
        plain_decode_s=plain.decode_s,
        guessing_decode_s=guessing.decode_s,
        num_requests=len(plain.outputs),
        num_output_tokens=sum(len(output.outputs[0].token_ids) for output in plain.outputs),
        num_same=sum(same),
        num_drafts=num_drafts,
        num_draft_tokens=num_draft_tokens,
        accepted_per_pos=tuple(accepted),
    )


def _earlier_cells(out: Path) -> list[Cell]:
    """Those of an earlier run that wrote there."""
    file = out / "results.json"
    if not file.exists():
        return []
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    turns = [
        [Turn(**{**turn, "accepted_per_pos": tuple(turn["accepted_per_pos"])}) for turn in c["turns"]] for c in cells
    ]
    return [Cell(**{**cell, "turns": found}) for cell, found in zip(cells, turns, strict=True)]


def _write(out: Path, facts: dict[str, Any], cells: Sequence[Cell]) -> str:
    out.mkdir(parents=True, exist_ok=True)
    data = {"facts": facts, "cells": [asdict(cell) for cell in cells]}
    (out / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    report = speculative_report.markdown(cells, facts)
    (out / "report.md").write_text(report, encoding="utf-8")
    return report


if __name__ == "__main__":
    sys.exit(main())
