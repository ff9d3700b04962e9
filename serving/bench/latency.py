"""`quire bench latency`: how long one batch of equal requests takes."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

from engine.config import EngineConfig
from serving.backend import EngineFactory
from serving.bench import report
from serving.bench.flags import add_bench_flags, count
from serving.bench.measure import Measured, run_repetition
from serving.bench.workloads import LengthRange, random_repetitions
from serving.errors import EXIT_OK
from serving.flags import engine_settings
from serving.timing import percentile, summarise

SUMMARY = "measure how long one batch takes"
PERCENTILES = (10, 25, 50, 75, 90, 99)


def set_up(parser: argparse.ArgumentParser, create: EngineFactory) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS]"
    parser.add_argument("--input-len", type=count, default=32, metavar="N", help="prompt tokens (default: 32)")
    parser.add_argument("--output-len", type=count, default=128, metavar="N", help="tokens to generate (default: 128)")
    parser.add_argument("--batch-size", type=count, default=1, metavar="N", help="requests at a time (default: 1)")
    add_bench_flags(parser, num_iters=10, warmup=2)
    parser.set_defaults(run=functools.partial(run, create=create))


def run(args: argparse.Namespace, create: EngineFactory) -> int:
    """Measure and report."""
    settings = engine_settings(args)
    config = EngineConfig.from_flat(**settings)
    settings.pop("model", None)
    settings.setdefault("compile_in_background", False)  # or the compiler would be measured too
    start = time.perf_counter()
    with create(config.load.model, **settings) as engine:
        startup_s = time.perf_counter() - start
        lengths = (LengthRange(args.input_len, args.input_len), LengthRange(args.output_len, args.output_len))
        repetitions = random_repetitions(
            args.warmup + args.num_iters,
            args.batch_size,
            lengths,
            vocab_size=engine.describe()["vocab_size"],
            seed=args.bench_seed,
        )
        detokenize = args.detokenize and not config.load.skip_tokenizer_init
        measured = [run_repetition(engine, repetition, detokenize=detokenize) for repetition in repetitions][
            args.warmup :
        ]
        values = summarise_latency(measured)
        asked = {
            name: vars(args)[name]
            for name in ("input_len", "output_len", "batch_size", "num_iters", "warmup", "bench_seed")
        }
        result = report.result(asked | engine_settings(args), engine, startup_s, values)
    _show(args, values, startup_s)
    if args.json is not None:
        report.write_json(result, args.json)
    return EXIT_OK


def summarise_latency(measured: Sequence[Measured]) -> dict[str, Any]:
    """The result's values, named as in `vllm bench latency`; all times in seconds."""
    latencies = [repetition.elapsed_s for repetition in measured]
    timings = [timing for repetition in measured for timing in repetition.timings]
    rates = [repetition.decode_tokens_per_s for repetition in measured if repetition.decode_tokens_per_s is not None]
    return {
        "avg_latency": statistics.fmean(latencies),
        "latencies": latencies,
        "percentiles": {str(percent): percentile(latencies, percent) for percent in PERCENTILES},
        "ttft_s": summarise([timing.ttft_s for timing in timings if timing.ttft_s is not None]),
        "tpot_s": summarise([timing.tpot_s for timing in timings if timing.tpot_s is not None]),
        "decode_tokens_per_s": summarise(rates),
        "num_cached_tokens": sum(repetition.num_cached_tokens for repetition in measured),
    }


def _show(args: argparse.Namespace, values: dict[str, Any], startup_s: float) -> None:
    rates = values["decode_tokens_per_s"]
    rows = {
        "start-up": f"{startup_s:.2f} s",
        "latency": _latency_text(values),
        "TTFT": report.milliseconds(values["ttft_s"]),
        "TPOT": report.milliseconds(values["tpot_s"]),
        "decode": f"median {rates['p50']:.1f} tokens/s ({rates['min']:.1f} to {rates['max']:.1f})" if rates else "-",
    }
    title = (
        f"batch {args.batch_size}, {args.input_len} prompt tokens, {args.output_len} new, {args.num_iters} iterations"
    )
    report.show(title, rows, to_stderr=args.json == report.STDOUT)


def _latency_text(values: dict[str, Any]) -> str:
    """The mean latency and its percentiles."""
    return report.milliseconds(
        {"mean": values["avg_latency"]} | {f"p{percent}": value for percent, value in values["percentiles"].items()}
    )
