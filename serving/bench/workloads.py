"""What the benchmarks run: seeded random token ids, or a workload file."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from serving.errors import UsageError


@dataclass(frozen=True)
class BenchRequest:
    """One request: the prompt's token ids and exactly how many tokens are to be generated."""

    prompt_token_ids: list[int]
    output_len: int


Repetition = list[BenchRequest]


@dataclass(frozen=True)
class LengthRange:
    """Lengths in tokens, uniform from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> LengthRange:
        """`128`, or `100:1024` for a range.

        Raises:
            argparse.ArgumentTypeError: `text` is neither.
        """
        try:
            low, high = (int(part) for part in (text.split(":") if ":" in text else (text, text)))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither a length such as 128 nor a range such as 100:1024"
            ) from None
        if not 1 <= low <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: lengths start at 1, and a range goes from low to high")
        return cls(low, high)

    def draw(self, generator: random.Random) -> int:
        """One length of the range."""
        return generator.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


def random_repetitions(
    num_repetitions: int, num_prompts: int, lengths: tuple[LengthRange, LengthRange], *, vocab_size: int, seed: int
) -> list[Repetition]:
    """Repetitions of `num_prompts` requests with prompt and output `lengths`, the same lengths in each, ids anew."""
    generator = random.Random(f"lengths {seed}")
    shapes = [(lengths[0].draw(generator), lengths[1].draw(generator)) for _ in range(num_prompts)]
    repetitions = []
    for index in range(num_repetitions):
        generator = random.Random(f"ids {seed} {index}")
        repetitions.append([BenchRequest(generator.choices(range(vocab_size), k=p), o) for p, o in shapes])
    return repetitions


def read_workload(path: Path, name: str) -> list[Repetition]:
    """The repetitions of workload `name` in a JSON file.

    A file maps names to workloads. A workload has `reps`, each one of: a list of token ids (one request), a list of
    such lists, or `{"prefix": ids, "suffixes": [ids, …]}` for requests that share a prefix. `out_len` is the number of
    tokens to generate for each request, or `out_lens` has one number per request.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the workload file {path}: {error}") from error
    workloads = (
        {key: value for key, value in file.items() if isinstance(value, dict) and "reps" in value}
        if isinstance(file, dict)
        else {}
    )
    if name not in workloads:
        raise UsageError(f"{path} has no workload {name!r}; it has: {', '.join(workloads) or 'none'}.")
    workload = workloads[name]
    repetitions = []
    for index, content in enumerate(workload["reps"]):
        where = f"{path}: {name}, repetition {index}"
        prompts = _prompts(content, where)
        lengths = workload["out_lens"] if "out_lens" in workload else [workload.get("out_len")] * len(prompts)
        if not _are_lengths(lengths) or len(lengths) != len(prompts):
            raise UsageError(
                f"{where}: out_len must be a positive number, or out_lens one for each of its {len(prompts)} prompts."
            )
        repetitions.append([BenchRequest(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)])
    return repetitions


def _prompts(content: Any, where: str) -> list[list[int]]:
    if _are_ids(content):
        return [content]
    if isinstance(content, dict):
        prefix, suffixes = content.get("prefix"), content.get("suffixes")
        if _are_ids(prefix) and _are_prompts(suffixes):
            return [prefix + suffix for suffix in suffixes]
    elif _are_prompts(content):
        return content
    raise UsageError(f"{where} is neither token ids, nor a list of them, nor a prefix with suffixes.")


def _are_prompts(value: Any) -> TypeGuard[list[list[int]]]:
    return isinstance(value, list) and bool(value) and all(_are_ids(prompt) for prompt in value)


def _are_ids(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(isinstance(token, int) and token >= 0 for token in value)


def _are_lengths(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(length, int) and length >= 1 for length in value)


def check_ids(repetitions: Sequence[Repetition], vocab_size: int) -> None:
    """Refuse a workload made for another model.

    Raises:
        UsageError: a token id is not in the vocabulary.
    """
    worst = max(max(request.prompt_token_ids) for repetition in repetitions for request in repetition)
    if worst >= vocab_size:
        raise UsageError(f"the workload has token id {worst}, but the model's vocabulary ends at {vocab_size - 1}.")
