"""What do guesses cost the host? Microseconds per step of each proposer that runs there, by the number of sequences.

    python -m benchmarks.proposer_cost

Sequences replay texts, a token each per step: half of them repeat their prompt, half go on in a text that they have not
seen, so that matches are long, short and missing. Printed are the time for taking note of the tokens and guessing
(`extend` and `propose`), and that of the whole `Speculator`: that, rates, comparisons, and the decision whether drafts
pay. Nothing is ever verified: that is the device's work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from benchmarks.markdown import table
from benchmarks.workloads.speculation import WORKLOADS
from engine.config import Environment
from engine.requests.request import Request
from engine.requests.sequence import Sequence as EngineSequence
from engine.runtime.speculation import make_proposer
from engine.sampling_params import SamplingParams
from engine.speculative.settings import SpeculativeSettings
from engine.speculative.speculator import Speculator
from engine.speculative.times import StepTimes
from engine.text.tokenizer import Tokenizer
from models.loading.resolver import FetchOptions, resolve_model
from serving.bench.machine import machine

MODEL = "demo"
METHODS = ("ngram", "suffix")
NUM_DRAFTS = 5
TEXT = Path(__file__).parents[1] / "models" / "quantizer" / "texts" / "held_out.txt"
PROMPT_LEN = 200
NUM_PAST = 64  # outputs that suffix decoding has seen before


@dataclass(frozen=True)
class Cost:
    """Of one step.

    Attributes:
        method: of guessing.
        num_seqs: sequences that get a token in the step.
        guess_us: median of `extend` and `propose` of all of them.
        whole_us: median of the whole speculator.
    """

    method: str
    num_seqs: int
    guess_us: float
    whole_us: float


@dataclass(frozen=True)
class Replay:
    """A prompt, and the tokens that follow it."""

    prompt: tuple[int, ...]
    output: list[int]


def replays(encode: Callable[[str], list[int]], count: int, num_steps: int) -> list[Replay]:
    """Alternately a chat whose answer repeats it, and a window of a text that goes on."""
    text = encode(TEXT.read_text(encoding="utf-8"))
    found = []
    for number in range(count):
        if number % 2:
            start = (number * 37) % (len(text) - PROMPT_LEN - num_steps)
            window = text[start : start + PROMPT_LEN + num_steps]
            found.append(Replay(tuple(window[:PROMPT_LEN]), window[PROMPT_LEN:]))
        else:
            messages = WORKLOADS["copy"].messages(number // 64)
            prompt = encode(messages[number % 64])
            found.append(Replay(tuple(prompt), (prompt * (1 + num_steps // len(prompt)))[:num_steps]))
    return found


def start(replay: Replay, number: int) -> EngineSequence:
    """A sequence that has its first token."""
    params = SamplingParams(max_tokens=len(replay.output))
    sequence = EngineSequence(Request(f"r{number}", None, replay.prompt, params, (), (), 0, 0, None, 0.0))
    sequence.output_token_ids = replay.output[:1]
    return sequence


def measure(method: str, num_seqs: int, every: Sequence[Replay], num_steps: int, warm_up: int) -> Cost:
    """The median step of each kind. The first `warm_up` steps do not count."""
    settings = SpeculativeSettings(method=method, num_speculative_tokens=NUM_DRAFTS)
    guess, whole = [], []
    for kind in (guess, whole):
        proposer = make_proposer(settings)
        times = StepTimes({1024: 1.0}, {NUM_DRAFTS: {1024: 5.0}})  # it never pays, and might
        speculator = Speculator(proposer, times, 1024)
        for number, replay in enumerate(every[-NUM_PAST:]):
            ended = start(replay, -number)
            ended.output_token_ids = list(replay.output)
            proposer.extend(ended)
            proposer.forget(ended)
        live = [(start(replay, number), replay.output) for number, replay in enumerate(every[:num_seqs])]
        sequences = [sequence for sequence, _ in live]
        for sequence in sequences:
            speculator.on_tokens(sequence, sequence.output_token_ids, 0)
        for step in range(1, num_steps):
            for sequence, output in live:
                sequence.output_token_ids.append(output[step])
            started = time.perf_counter()
            if kind is guess:
                for sequence in sequences:
                    proposer.extend(sequence)
                    proposer.propose(sequence)
            else:
                for sequence, output in live:
                    speculator.on_tokens(sequence, [output[step]], 0)
                speculator.pays(sequences)
            if step > warm_up:
                kind.append(time.perf_counter() - started)
    return Cost(method, num_seqs, 1e6 * statistics.median(guess), 1e6 * statistics.median(whole))


def markdown(costs: Sequence[Cost]) -> str:
    """A table, sequences across."""
    sizes = sorted({cost.num_seqs for cost in costs})
    found = {(cost.method, cost.num_seqs): cost for cost in costs}
    rows = []
    for method in dict.fromkeys(cost.method for cost in costs):
        every = [found[method, size] for size in sizes]
        rows.append([f"{method}: guesses", *(f"{cost.guess_us:.0f}" for cost in every)])
        rows.append([f"{method}: whole speculator", *(f"{cost.whole_us:.0f}" for cost in every)])
    return table(("µs per step at sequences", *map(str, sizes)), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proposer_cost", description=__doc__)
    parser.add_argument("--sequences", default="1,16,64,256", help="numbers of sequences (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="tokens of each sequence (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local/proposer-cost"))
    args = parser.parse_args(argv)
    sizes = [int(size) for size in args.sequences.split(",")]
    cache_dir = Environment.read().cache_dir
    tokenizer = Tokenizer.load(resolve_model(MODEL, FetchOptions(cache_dir)).path)
    every = replays(lambda text: tokenizer.encode(text, add_special_tokens=False), max(sizes), args.steps)
    costs = [measure(method, size, every, args.steps, args.steps // 4) for method in METHODS for size in sizes]
    args.out.mkdir(parents=True, exist_ok=True)
    data = {"date": date.today().isoformat(), "machine": machine(), "costs": [asdict(cost) for cost in costs]}
    (args.out / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    report = markdown(costs)
    (args.out / "report.md").write_text(report + "\n", encoding="utf-8")
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
