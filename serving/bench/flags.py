"""The flags that both benchmarks have."""

from __future__ import annotations

import argparse
from pathlib import Path

from serving.flags import add_engine_flags


def add_bench_flags(parser: argparse.ArgumentParser, *, num_iters: int, warmup: int) -> None:
    """Add how often, with which seed and where to, and all engine flags."""
    parser.add_argument(
        "--num-iters", type=count, default=num_iters, metavar="N", help=f"measured repetitions (default: {num_iters})"
    )
    parser.add_argument(
        "--warmup", type=count_or_zero, default=warmup, metavar="N", help=f"repetitions before them (default: {warmup})"
    )
    parser.add_argument(
        "--bench-seed", type=int, default=0, metavar="N", help="seed of the random prompts (default: 0)"
    )
    parser.add_argument(
        "--detokenize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also make text of the tokens (default: true)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file; '-' = stdout")
    add_engine_flags(parser)


def count(text: str) -> int:
    """A number of things: 1 or more.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    value = count_or_zero(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def count_or_zero(text: str) -> int:
    """0 or more.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)
