"""`quire plan`: what fits on a device, and how fast it could be at best, before anything is downloaded or rented."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json

from engine.config import EngineConfig
from engine.planning.devices import DEVICES
from engine.planning.report import CapacityPlan
from engine.runtime.progress import progress_bar
from serving.backend import ModelPlanner
from serving.errors import EXIT_OK
from serving.flags import add_engine_flags, engine_settings

SUMMARY = "say what fits on a device, from a model's config alone"

USED_FLAGS = (
    "dtype", "quantization", "load_format", "max_model_len", "revision", "download_dir", "block_size",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "kv_cache_dtype", "max_num_seqs",
    "max_num_batched_tokens", "enable_chunked_prefill", "compilation_cache_dir", "show_progress",
)  # fmt: skip
GIB, MIB = 1 << 30, 1 << 20


def set_up(parser: argparse.ArgumentParser, plan: ModelPlanner) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS] MODEL"
    parser.add_argument("model", metavar="MODEL", help="directory with config.json, .gguf file, hub id, or 'demo'")
    parser.add_argument("--device", choices=tuple(DEVICES), default="cpu", help="to plan for (default: %(default)s)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="the device's memory, if it is not as usual")
    parser.add_argument(
        "--lengths",
        type=_lengths,
        metavar="N,N",
        help="tokens of a sequence, prompt and output, of which the number that fits is asked for",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    add_engine_flags(parser, only=USED_FLAGS)
    parser.set_defaults(run=functools.partial(run, plan=plan))


def _lengths(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run(args: argparse.Namespace, plan: ModelPlanner) -> int:
    """Plan, then print."""
    config = EngineConfig.from_flat(model=args.model, **engine_settings(args))
    memory = None if args.memory is None else int(args.memory * GIB)
    with progress_bar("fetching", show=config.compile.show_progress) as progress:
        found = plan(config, args.device, memory, args.lengths, progress)
    print(json.dumps(dataclasses.asdict(found), indent=2) if args.json else table(found))
    return EXIT_OK


def table(plan: CapacityPlan) -> str:
    """The plan for people."""
    lines = [
        f"{plan.model}: {plan.family}, {plan.num_layers} layers, {plan.num_parameters / 1e6:,.0f} M parameters",
        f"{plan.device_name}: weights {plan.quantization or plan.dtype}, activations {plan.dtype}, "
        f"KV cache {plan.kv_cache_dtype}",
        f"max_model_len {plan.max_model_len}, max_num_seqs {plan.max_num_seqs}, "
        f"max_num_batched_tokens {plan.max_num_batched_tokens}, block_size {plan.block_size}",
        "",
        *_memory(plan),
        "",
        *_columns(
            ("length", "fit in memory", "run at a time"),
            [(str(each.length), str(each.by_memory), str(each.running)) for each in plan.concurrency],
        ),
        "",
        *_columns(
            ("step, tokens", "sequences", "work space, MiB", ""),
            [(str(b.num_tokens), str(b.num_seqs), f"{b.size / MIB:,.1f}", b.how) for b in plan.buckets],
        ),
    ]
    if plan.decode:
        rows = [
            (
                str(each.num_seqs),
                str(each.context),
                f"{1e3 * each.seconds:.2f}",
                f"{each.num_seqs / each.seconds:,.0f}",
                each.bound,
                "" if each.fits else "does not fit",
            )
            for each in plan.decode
        ]
        lines += ["", *_columns(("decode, sequences", "context", "least ms", "most tokens/s", "bound by", ""), rows)]
    if plan.prefill:
        rows = [(str(each.num_tokens), f"{1e3 * each.seconds:.1f}") for each in plan.prefill]
        lines += ["", *_columns(("prompt, tokens", "least ms"), rows)]
    return "\n".join([*lines, "", *plan.notes, f"Device: {plan.device_source}."])


def _memory(plan: CapacityPlan) -> list[str]:
    space = plan.work_space
    rows = [
        ("weights", f"{plan.weights / MIB:,.1f}", "exact"),
        ("state", f"{plan.state / MIB:,.1f}", "exact"),
        ("work space", f"{space.size / MIB:,.1f}", f"{space.how}, {space.num_tokens} tokens of {space.num_seqs}"),
        ("KV cache", f"{plan.kv / MIB:,.1f}", f"{plan.num_blocks} blocks of {plan.block / 1024:,.1f} KiB"),
        ("all", f"{(plan.weights + plan.state + space.size + plan.kv) / MIB:,.1f}", f"of {plan.limit / MIB:,.1f}"),
    ]
    return _columns(("memory", "MiB", ""), rows)


def _columns(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as they need; numbers to the right, words to the left."""
    every = [header, *rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(header))]
    right = [all(row[c].replace(",", "").replace(".", "").isdigit() for row in rows) for c in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if numbers else cell.ljust(width)
            for cell, width, numbers in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in every
    ]
