"""`quire bench throughput`: how much work per second when all requests are there at once."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from serving.backend import EngineFactory
from serving.bench import report
from serving.bench.flags import add_bench_flags, count
from serving.bench.measure import Measured, run_repetition
from serving.bench.workloads import LengthRange, Repetition, check_ids, random_repetitions, read_workload
from serving.errors import EXIT_OK, UsageError
from serving.flags import engine_settings
from serving.timing import summarise

SUMMARY = "measure how many tokens per second a full engine generates"


def set_up(parser: argparse.ArgumentParser, create: EngineFactory) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS]"
    parser.add_argument("--num-prompts", type=count, default=64, metavar="N", help="requests (default: 64)")
    length = {"type": LengthRange.parse, "metavar": "N|LOW:HIGH"}
    parser.add_argument("--input-len", **length, default="128", help="prompt tokens, or a uniform range (default: 128)")
    parser.add_argument(
        "--output-len", **length, default="128", help="tokens to generate, or a uniform range (default: 128)"
    )
    parser.add_argument("--workload", type=Path, metavar="FILE", help="a file of workloads instead of random prompts")
    parser.add_argument("--workload-name", metavar="NAME", help="which workload of the file, such as w2")
    add_bench_flags(parser, num_iters=3, warmup=1)
    parser.set_defaults(run=functools.partial(run, create=create))


def run(args: argparse.Namespace, create: EngineFactory) -> int:
    """Measure and report."""
    settings = engine_settings(args)
    config = EngineConfig.from_flat(**settings)
    settings.pop("model", None)
    settings.setdefault("compile_in_background", False)  # or the compiler would be measured too
    from_file = _read_file(args)
    start = time.perf_counter()
    with create(config.load.model, **settings) as engine:
        startup_s = time.perf_counter() - start
        vocab_size = engine.describe()["vocab_size"]
        repetitions = from_file if from_file is not None else _random(args, vocab_size)
        check_ids(repetitions, vocab_size)
        detokenize = args.detokenize and not config.load.skip_tokenizer_init
        measured = [run_repetition(engine, repetition, detokenize=detokenize) for repetition in repetitions][
            args.warmup :
        ]
        values = summarise_throughput(measured)
        result = report.result(_asked(args) | engine_settings(args), engine, startup_s, values)
    _show(args, values, startup_s)
    if args.json is not None:
        report.write_json(result, args.json)
    return EXIT_OK


def _read_file(args: argparse.Namespace) -> list[Repetition] | None:
    """As many repetitions of the file as the flags ask for; None without a file."""
    if args.workload is None:
        if args.workload_name is not None:
            raise UsageError("--workload-name needs --workload FILE.")
        return None
    if args.workload_name is None:
        raise UsageError("--workload needs --workload-name: which workload of the file, such as w2.")
    repetitions = read_workload(args.workload, args.workload_name)
    wanted = args.warmup + args.num_iters
    if len(repetitions) < wanted:
        raise UsageError(
            f"{args.workload} has {len(repetitions)} repetitions of {args.workload_name}, "
            f"but --warmup {args.warmup} and --num-iters {args.num_iters} need {wanted}."
        )
    return repetitions[:wanted]


def _random(args: argparse.Namespace, vocab_size: int) -> list[Repetition]:
    lengths = (args.input_len, args.output_len)
    return random_repetitions(
        args.warmup + args.num_iters, args.num_prompts, lengths, vocab_size=vocab_size, seed=args.bench_seed
    )


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    asked: dict[str, Any] = {"num_iters": args.num_iters, "warmup": args.warmup}
    if args.workload is not None:
        return asked | {"workload": str(args.workload), "workload_name": args.workload_name}
    lengths = {"input_len": str(args.input_len), "output_len": str(args.output_len)}
    return asked | {"num_prompts": args.num_prompts, "bench_seed": args.bench_seed} | lengths


def summarise_throughput(measured: Sequence[Measured]) -> dict[str, Any]:
    """The result's values, those of the median repetition at the top, named as in `vllm bench throughput`.

    All times are in seconds.
    """
    repetitions = [_rates(repetition) for repetition in measured]
    median = statistics.median_low([repetition.elapsed_s for repetition in measured])
    index = next(i for i, repetition in enumerate(measured) if repetition.elapsed_s == median)
    timings = measured[index].timings
    return repetitions[index] | {
        "ttft_s": summarise([timing.ttft_s for timing in timings if timing.ttft_s is not None]),
        "tpot_s": summarise([timing.tpot_s for timing in timings if timing.tpot_s is not None]),
        "e2e_s": summarise([timing.e2e_s for timing in timings if timing.e2e_s is not None]),
        "repetitions": repetitions,
    }


def _rates(measured: Measured) -> dict[str, Any]:
    num_tokens = measured.num_prompt_tokens + measured.num_output_tokens
    return {
        "elapsed_time": measured.elapsed_s,
        "num_requests": len(measured.timings),
        "num_prompt_tokens": measured.num_prompt_tokens,
        "num_output_tokens": measured.num_output_tokens,
        "total_num_tokens": num_tokens,
        "num_cached_tokens": measured.num_cached_tokens,
        "requests_per_second": len(measured.timings) / measured.elapsed_s,
        "output_tokens_per_second": measured.num_output_tokens / measured.elapsed_s,
        "tokens_per_second": num_tokens / measured.elapsed_s,
    }


def _show(args: argparse.Namespace, values: dict[str, Any], startup_s: float) -> None:
    def spread(name: str, digits: int) -> str:
        every = [repetition[name] for repetition in values["repetitions"]]
        return f"{values[name]:.{digits}f} ({min(every):.{digits}f} to {max(every):.{digits}f})"

    rows = {
        "start-up": f"{startup_s:.2f} s",
        "elapsed": f"{spread('elapsed_time', 3)} s",
        "requests/s": spread("requests_per_second", 2),
        "output tokens/s": spread("output_tokens_per_second", 1),
        "total tokens/s": spread("tokens_per_second", 1),
        "cached prompt tokens": str(values["num_cached_tokens"]),
        "TTFT": report.milliseconds(values["ttft_s"]),
        "TPOT": report.milliseconds(values["tpot_s"]),
        "E2E": report.milliseconds(values["e2e_s"]),
    }
    title = (
        f"{values['num_requests']} requests, {values['num_prompt_tokens']} prompt tokens, "
        f"{values['num_output_tokens']} output tokens; median of {args.num_iters} repetitions (lowest to highest)"
    )
    report.show(title, rows, to_stderr=args.json == report.STDOUT)
