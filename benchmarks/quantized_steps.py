"""What do quantized weights save in a whole decode step on a CPU? `python -m benchmarks.quantized_steps --rows 1,16`

Engines of one model take turns in one process, each with its own format of weights: so many sequences decode at a
time, and a turn's figure is the mean time of its steps. Printed are the ratios to the dense engine, of the smallest
times and the median of those of one turn, and how fast a step reads its weights: bytes of layers and head over its
smallest time, beside what the machine reads at best. A format may be a path to a GGUF file, whose blocks stay packed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from benchmarks.ceilings import read_with_numpy
from benchmarks.costs import ModelCosts
from benchmarks.markdown import table
from benchmarks.roofline import model_config, num_cores
from engine import Engine, SamplingParams
from engine.input_processor import Prompt
from engine.outputs import RequestOutput

DENSE = "bfloat16"
BYTES = {  # of a layer's weight, scales included
    DENSE: 2.0,
    "int8": 1.0,
    "int8_w8a8": 1.0,
    "fp8": 1.0,
    "int4_g64": 0.5 + 2 / 64,
    "int4_g32": 0.5 + 2 / 32,
    "gguf": 0.5 + 5 / 32,  # blocks of Q4_1, as the demo model's file has: a scale, a minimum, a zero point
}
FILE_BYTES = 1.0 + 2 / 32  # blocks of Q8_0
PROMPT_LEN = 8
MAX_MODEL_LEN = 128


def open_engine(stack: ExitStack, model: str, form: str, rows: int) -> Engine:
    """An engine whose weights are of that format, for `rows` sequences."""
    is_file = form.endswith(".gguf")
    settings = {"quantization": "gguf" if is_file else form} if form != DENSE else {}
    engine = Engine(
        form if is_file else model,
        dtype=DENSE,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=rows,
        max_num_batched_tokens=max(rows * PROMPT_LEN, MAX_MODEL_LEN),
        num_gpu_blocks_override=rows * MAX_MODEL_LEN // 16 + 1,
        enable_prefix_caching=False,
        show_progress=False,
        **settings,
    )
    return stack.enter_context(engine)


def step_s(engine: Engine, rows: int, turn: int, num_tokens: int) -> float:
    """Mean seconds of a decode step with `rows` sequences."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens, detokenize=False)
    prompts: list[Prompt] = [
        {"prompt_token_ids": [1000 + 7 * (turn * rows + r) + i for i in range(PROMPT_LEN)]} for r in range(rows)
    ]
    return _decode_s(engine.generate(prompts, params)) / (num_tokens - 1)


def _decode_s(outputs: Sequence[RequestOutput]) -> float:
    """From the moment when all had their first token to the last token of all."""
    every = [output.metrics for output in outputs if output.metrics is not None]
    first, last = [m.first_token_ts for m in every], [m.last_token_ts for m in every]
    return max(ts for ts in last if ts is not None) - max(ts for ts in first if ts is not None)


def measure(
    model: str, forms: Sequence[str], rows: Sequence[int], turns: int, num_tokens: int
) -> Iterator[dict[str, list[float]]]:
    """For each number of rows: seconds per step of each turn, by format."""
    with ExitStack() as stack:
        engines = {form: open_engine(stack, model, form, max(rows)) for form in forms}
        for count in rows:
            times: dict[str, list[float]] = {form: [] for form in forms}
            for turn in range(turns + 1):  # the first one warms up
                for form, engine in engines.items():
                    seconds = step_s(engine, count, turn, num_tokens)
                    if turn:
                        times[form].append(seconds)
            yield times


def row_of(form: str, times: dict[str, list[float]], costs: ModelCosts, best_read: float) -> list[str]:
    """Of the table: step time, ratios to dense, bytes per second."""
    own, dense = times[form], times[DENSE]
    median = statistics.median(a / b for a, b in zip(own, dense, strict=True))
    read = costs.body_weights * BYTES.get(form, FILE_BYTES) + costs.head_weights * costs.item_bytes
    rate = read / min(own)
    return [
        form.rsplit("/", 1)[-1],
        f"{min(own) * 1e3:.2f}",
        f"{min(own) / min(dense):.2f}, {median:.2f}",
        f"{rate / 1e9:.1f}",
        f"{100 * rate / best_read:.0f} %",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse flags, measure, print a table for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", default="1,4,8,16,64")
    parser.add_argument("--formats", default="int8,int8_w8a8,int4_g64,int4_g32,fp8", help="at most five")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=33, help="of each sequence and turn (default: 33)")
    options = parser.parse_args(arguments)
    forms = [DENSE, *options.formats.split(",")]
    unknown = [form for form in forms if form not in BYTES and not form.endswith(".gguf")]
    if unknown or len(forms) > 6:  # more engines' executables would be more mappings than a process may have
        raise SystemExit(f"--formats: at most five of {', '.join(list(BYTES)[1:])} and paths of GGUF files")
    costs = ModelCosts.of(model_config(options.model), DENSE)
    best_read = read_with_numpy(num_cores())
    print(f"{options.model}, {options.turns} turns; the machine reads {best_read / 1e9:.1f} GB/s")
    rows = [int(part) for part in options.rows.split(",")]
    for count, times in zip(rows, measure(options.model, forms, rows, options.turns, options.tokens), strict=True):
        lines = [row_of(form, times, costs, best_read) for form in forms]
        print(f"\n{count} rows\n\n" + table(["", "ms per step", "to dense", "GB/s", "of the best"], lines), flush=True)


if __name__ == "__main__":
    main()
