"""`quire bench serve`: load a server that speaks the OpenAI API, and report its latencies and throughput.

The figures are defined, and named in the JSON result, as those of `vllm bench serve` (`serve_metrics.py`). Any server
will do; this command loads no model and no jax.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import uvloop

from serving.bench import report, serve_plot
from serving.bench.flags import count, count_or_zero
from serving.bench.machine import machine
from serving.bench.serve_client import CHAT, ENDPOINTS, Run, Target, first_model, run_requests
from serving.bench.serve_metrics import GOODPUT_METRICS, metrics
from serving.bench.serve_requests import (
    Dataset,
    MakePrompt,
    PrefixRepetition,
    RandomLengths,
    ServeRequest,
    ShareGpt,
    arrival_times,
    ids_prompt,
    text_prompt,
)
from serving.bench.workloads import read_workload
from serving.errors import EXIT_OK, MeasurementError, UsageError

SUMMARY = "load a running server and measure its latencies"
SHAREGPT, RANDOM, PREFIX, FILE = "sharegpt", "random", "prefix-repetition", "file"
MAX_ERRORS_SHOWN = 10
BUSY_CLIENT = 0.8  # of one core: beyond this the client may be what limits


def set_up(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS]"
    _server_flags(parser.add_argument_group("server"))
    _workload_flags(parser.add_argument_group("workload"))
    load = parser.add_argument_group("load")
    load.add_argument("--num-prompts", type=count, default=1000, metavar="N", help="requests (default: 1000)")
    load.add_argument(
        "--request-rate", type=positive, default=math.inf, metavar="R", help="requests per second (default: inf)"
    )
    load.add_argument(
        "--burstiness",
        type=positive,
        default=1.0,
        metavar="B",
        help="shape of the gaps' gamma distribution: 1 = Poisson, below = bursts, inf = a fixed rate (default: 1)",
    )
    load.add_argument("--max-concurrency", type=count, metavar="N", help="most requests at a time (default: no limit)")
    load.add_argument(
        "--num-warmups", type=count_or_zero, default=1, metavar="N", help="uncounted requests first (default: 1)"
    )
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts, lengths and gaps (default: 0)")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--goodput",
        type=limit,
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count requests that keep all of these limits, as in ttft:500 tpot:50 (also e2el)",
    )
    results.add_argument(
        "--metric-percentiles", type=percentiles, default=(99.0,), metavar="P,…", help="such as 50,90,99 (default: 99)"
    )
    results.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file; '-' = stdout")
    results.add_argument("--plot", type=Path, metavar="OUT", help="draw it (.png, .svg or .pdf; needs matplotlib)")
    parser.set_defaults(run=run)


def _server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    group.add_argument("--endpoint", choices=ENDPOINTS, default=ENDPOINTS[0], help="default: %(default)s")
    group.add_argument("--model", metavar="NAME", help="as the server calls it (default: its first)")
    group.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="generate exactly the wanted number of tokens, and count anything else as failed (default: true)",
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0")
    group.add_argument(
        "--request-timeout", type=positive, default=3600.0, metavar="S", help="seconds for one request (default: 3600)"
    )


def _workload_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset",
        choices=(SHAREGPT, RANDOM, PREFIX, FILE),
        default=RANDOM,
        help="lengths as in ShareGPT, of --input-len and --output-len, prefixes shared by many, or a workload file "
        "(default: random)",
    )
    group.add_argument("--input-len", type=count, default=1024, metavar="N", help="random: prompt (default: 1024)")
    group.add_argument("--output-len", type=count, default=128, metavar="N", help="random, prefix: (default: 128)")
    group.add_argument(
        "--range-ratio",
        type=ratio,
        default=0.0,
        metavar="R",
        help="random: lengths vary by up to R of themselves (default: 0)",
    )
    group.add_argument("--prefix-len", type=count, default=256, metavar="N", help="prefix: shared (default: 256)")
    group.add_argument("--suffix-len", type=count, default=256, metavar="N", help="prefix: own (default: 256)")
    group.add_argument("--num-prefixes", type=count, default=10, metavar="N", help="prefix: how many (default: 10)")
    group.add_argument("--workload", type=Path, metavar="FILE", help="file: as for `quire bench throughput`")
    group.add_argument("--workload-name", metavar="NAME", help="file: which of it, such as w2 (its repetition 1)")
    group.add_argument(
        "--vocab-size", type=count, metavar="N", help="send token ids below this instead of text (not for chats)"
    )
    group.add_argument(
        "--first-id", type=count_or_zero, default=100, metavar="N", help="lowest of these ids (default: 100)"
    )


def run(args: argparse.Namespace) -> int:
    """Load the server and report.

    Raises:
        UsageError: flags that contradict each other, or a server that is not there.
        MeasurementError: every request failed.
    """
    if args.plot is not None:
        serve_plot.check_available()
    requests, warmups = _requests(args)
    times = arrival_times(len(requests), args.request_rate, args.burstiness, f"arrivals {args.seed}")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        target = runner.run(_target(args))
        measured = runner.run(
            run_requests(target, requests, times, max_concurrency=args.max_concurrency, warmups=warmups)
        )
    values = metrics(
        measured.traces, measured.duration_s, percents=args.metric_percentiles, goodput_ms=dict(args.goodput)
    )
    result = _result(args, target, measured, values)
    _show(args, target, result)
    if args.json is not None:
        report.write_json(result, args.json)
    if not values["completed"]:
        raise MeasurementError(f"all {values['failed']} requests failed.")
    if args.plot is not None:
        serve_plot.draw(measured.traces, _title(args, target, result), args.plot)
    return EXIT_OK


async def _target(args: argparse.Namespace) -> Target:
    make = functools.partial(
        Target,
        base_url=args.base_url.rstrip("/"),
        endpoint=args.endpoint,
        api_key=args.api_key,
        ignore_eos=args.ignore_eos,
        temperature=args.temperature,
        timeout_s=args.request_timeout,
    )
    name = args.model or await first_model(args.base_url.rstrip("/"), make(model="").headers)
    return make(model=name)


def _requests(args: argparse.Namespace) -> tuple[list[ServeRequest], list[ServeRequest]]:
    """The requests, and others of the same kind to warm up with, so that no cache knows the former."""
    if args.dataset == FILE:
        return _file_requests(args)
    if args.workload is not None or args.workload_name is not None:
        raise UsageError("--workload and --workload-name need --dataset file.")
    dataset, make = _dataset(args), _make_prompt(args)
    requests = dataset.requests(args.num_prompts, f"requests {args.seed}", make)
    return requests, dataset.requests(args.num_warmups, f"warm-ups {args.seed}", make)


def _dataset(args: argparse.Namespace) -> Dataset:
    if args.dataset == SHAREGPT:
        return ShareGpt()
    if args.dataset == PREFIX:
        return PrefixRepetition(args.prefix_len, args.suffix_len, args.num_prefixes, args.output_len)
    return RandomLengths(args.input_len, args.output_len, args.range_ratio)


def _make_prompt(args: argparse.Namespace) -> MakePrompt:
    if args.vocab_size is None:
        return text_prompt
    if args.endpoint == CHAT:
        raise UsageError(f"{CHAT} takes text, not token ids: leave --vocab-size out.")
    if args.first_id >= args.vocab_size:
        raise UsageError(f"--first-id {args.first_id} is not below --vocab-size {args.vocab_size}.")
    return ids_prompt(args.vocab_size, args.first_id)


def _file_requests(args: argparse.Namespace) -> tuple[list[ServeRequest], list[ServeRequest]]:
    if args.workload is None or args.workload_name is None:
        raise UsageError("--dataset file needs --workload FILE and --workload-name NAME.")
    if args.endpoint == CHAT:
        raise UsageError(f"{CHAT} takes text, and a workload file has token ids.")
    repetitions = read_workload(args.workload, args.workload_name)
    if len(repetitions) < 2:
        raise UsageError(f"{args.workload}: {args.workload_name} needs two repetitions, the first to warm up.")
    warm, measured = (
        [ServeRequest(request.prompt_token_ids, request.output_len) for request in repetition]
        for repetition in repetitions[:2]
    )
    return measured[: args.num_prompts], warm[: args.num_warmups]


def _result(args: argparse.Namespace, target: Target, measured: Run, values: dict[str, Any]) -> dict[str, Any]:
    """One JSON object: figures, raw times, settings, machine. Never the API key."""
    done = [trace for trace in measured.traces if trace.error is None]
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "api_key", "json", "plot")}
    settings["goodput"] = dict(args.goodput)
    # JSON has no infinity and no paths.
    settings |= {name: str(value) for name, value in settings.items() if isinstance(value, Path) or value == math.inf}
    return values | {
        "client_cpu_s": measured.client_cpu_s,
        "model": target.model,
        "errors": dict(Counter(trace.error for trace in measured.traces if trace.error is not None)),
        "ttfts": [trace.ttft_s for trace in done],
        "itls": [trace.itls_s for trace in done],
        "input_lens": [trace.num_prompt_tokens for trace in done],
        "output_lens": [trace.num_output_tokens for trace in done],
        "start_times": [trace.sent_s for trace in done],
        "settings": settings,
        "machine": machine(),
    }


def _title(args: argparse.Namespace, target: Target, result: dict[str, Any]) -> str:
    rate = "all at once" if math.isinf(args.request_rate) else f"{args.request_rate:g} requests/s"
    total = result["completed"] + result["failed"]
    return f"{target.model} at {target.base_url}{target.endpoint}: {total} requests of {args.dataset}, {rate}"


def _show(args: argparse.Namespace, target: Target, result: dict[str, Any]) -> None:
    rows = {
        "successful, failed requests": f"{result['completed']}, {result['failed']}",
        "duration": f"{result['duration']:.2f} s",
        "input, output tokens": f"{result['total_input_tokens']}, {result['total_output_tokens']}",
        "requests/s": f"{result['request_throughput']:.2f}",
    }
    if args.goodput:
        rows["good requests/s"] = f"{result['request_goodput']:.2f}"
    rows |= {
        "output tokens/s": f"{result['output_throughput']:.1f} (peak {result['max_output_tokens_per_s']:.0f})",
        "total tokens/s": f"{result['total_token_throughput']:.1f}",
        "most requests at a time": str(result["max_concurrent_requests"]),
    }
    names = ["mean", "median", "std", *(f"p{percent:g}" for percent in args.metric_percentiles)]
    for latency in ("ttft", "tpot", "itl", "e2el"):
        figures = [(name, result[f"{name}_{latency}_ms"]) for name in names]
        measured = " · ".join(f"{name} {value:.1f}" for name, value in figures if value is not None)
        rows[latency.upper()] = f"{measured} ms" if measured else "-"
    rows["CPU time of this client"] = f"{result['client_cpu_s']:.2f} s"
    report.show(_title(args, target, result), rows, to_stderr=args.json == report.STDOUT)
    for error, number in Counter(result["errors"]).most_common(MAX_ERRORS_SHOWN):
        print(f"quire: {number} requests failed: {error}", file=sys.stderr)
    if result["client_cpu_s"] > BUSY_CLIENT * result["duration"]:
        print("quire: this client kept a core busy: it may have been what limits.", file=sys.stderr)


def positive(text: str) -> float:
    """A number above 0; `inf` too.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def ratio(text: str) -> float:
    """A number from 0 to below 1.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0 to below 1")
    return value


def limit(text: str) -> tuple[str, float]:
    """`ttft:500`: a latency and its limit in milliseconds.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    name, _, milliseconds = text.partition(":")
    if name not in GOODPUT_METRICS:
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with one of {', '.join(GOODPUT_METRICS)}, and ':'")
    return name, positive(milliseconds)


def percentiles(text: str) -> tuple[float, ...]:
    """`50,90,99`: numbers from 0 to 100.

    Raises:
        argparse.ArgumentTypeError: they are not.
    """
    values = tuple(_number(part) for part in text.split(","))
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} has a number that is not from 0 to 100")
    return values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
