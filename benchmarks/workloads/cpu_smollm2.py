"""The CPU workloads for SmolLM2-135M-Instruct: four, and one more at several numbers of requests.

| | what | reads |
|---|---|---|
| w1 | 1 request, 128 prompt tokens, 128 new | time to first token, decode rate, time between tokens |
| w2 | 64 requests at once, lengths as in ShareGPT (14,080 prompt tokens, 11,519 output tokens) | throughput |
| w3 | one 2048-token prompt, 1 new token | prefill rate |
| w4 | 32 requests that share a 512-token prefix, own 32-token suffix, 32 new each | prefix sharing |
| s1 … s64 | 1, 2, 4 … 64 requests at once, 64 prompt tokens and 32 new each | throughput by concurrency |

Token ids are uniform random ids above the special tokens. Every repetition has ids of its own, so that a prefix cache
carries nothing from one to the next; lengths are the same in all. Repetition 0 is for warming up.

    python -m benchmarks.workloads.cpu_smollm2 OUT.json     # as a file, for `quire bench throughput --workload`
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "SmolLM2-135M-Instruct"
VOCAB_LOW, VOCAB_HIGH = 17, 49152  # ids below 17 are special tokens
SEED = 20251120
STREAMS_SEED = 100  # added to the number of streams, so that they have other ids than w1 to w4

# fmt: off
W2_PROMPT_LENS = (
    87, 128, 16, 442, 1024, 69, 74, 370, 176, 287, 44, 113, 484, 86, 47, 60, 210, 343, 1024, 447, 107, 166, 150, 498,
    201, 185, 115, 53, 150, 237, 68, 290, 210, 43, 256, 158, 236, 37, 147, 68, 16, 245, 257, 278, 49, 272, 366, 163,
    120, 121, 159, 585, 439, 559, 54, 174, 63, 58, 126, 370, 340, 199, 132, 29,
)
W2_OUTPUT_LENS = (
    512, 280, 224, 155, 71, 196, 126, 88, 115, 35, 347, 65, 129, 163, 132, 490, 244, 100, 444, 194, 112, 332, 101, 285,
    84, 48, 512, 117, 167, 197, 25, 78, 86, 62, 56, 85, 251, 118, 186, 221, 512, 150, 290, 34, 109, 157, 140, 98, 108,
    424, 165, 78, 144, 334, 63, 57, 103, 49, 118, 40, 130, 444, 47, 492,
)
# fmt: on


@dataclass(frozen=True)
class Workload:
    """One workload: the shape of its requests, all sent at once.

    Attributes:
        name: "w1" to "w4", or "s" and the number of streams.
        about: for tables.
        prompt_lens, output_lens: tokens per request, same length; `output_lens` are generated exactly.
        shared_prefix_len: leading tokens that all prompts have in common.
        streamed: the times of single tokens are wanted, not only the wall time.
    """

    name: str
    about: str
    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    shared_prefix_len: int = 0
    streamed: bool = False

    @property
    def num_requests(self) -> int:
        """Number of requests."""
        return len(self.prompt_lens)

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(self.prompt_lens)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of all requests."""
        return sum(self.output_lens)

    def prompts(self, repetition: int) -> list[list[int]]:
        """Token ids of each prompt; each repetition has its own."""
        number = int(self.name[1:]) + (STREAMS_SEED if self.name.startswith("s") else 0)
        draw = np.random.default_rng([SEED, repetition, number])

        def ids(count: int) -> list[int]:
            return draw.integers(VOCAB_LOW, VOCAB_HIGH, count).tolist()

        prefix = ids(self.shared_prefix_len)
        return [prefix + ids(length - self.shared_prefix_len) for length in self.prompt_lens]

    def cut(self, num_requests: int, most_output: int) -> Workload:
        """A smaller workload of the first requests, for a quick look: other figures, not to be compared."""
        return Workload(
            name=self.name,
            about=f"{self.about}, CUT to {min(num_requests, self.num_requests)} requests of at most {most_output} new",
            prompt_lens=self.prompt_lens[:num_requests],
            output_lens=tuple(min(length, most_output) for length in self.output_lens[:num_requests]),
            shared_prefix_len=self.shared_prefix_len,
            streamed=self.streamed,
        )


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("w1", "1 request, 128 in, 128 out", (128,), (128,), streamed=True),
        Workload("w2", "64 requests, ShareGPT-like lengths", W2_PROMPT_LENS, W2_OUTPUT_LENS),
        Workload("w3", "1 request, 2048 in, 1 out", (2048,), (1,)),
        Workload("w4", "32 requests, shared prefix 512 + 32 in, 32 out", (544,) * 32, (32,) * 32, 512),
    )
}

STREAMS: dict[str, Workload] = {
    f"s{count}": Workload(f"s{count}", f"{count} streams, 64 in, 32 out", (64,) * count, (32,) * count)
    for count in (1, 2, 4, 8, 16, 32, 64)
}
ALL: dict[str, Workload] = WORKLOADS | STREAMS

# SHA-256 of the canonical JSON of `prompts(0) … prompts(3)`: another generator would measure something else.
SHA256 = {
    "w1": "001fd4d0825a8f2ddfbdece712912853f05b2cb22cdd9e437684b8fad3f169e8",
    "w2": "94d708d958c5b3a8d8f9044f4026aa92216719847fbbd4fe0157d916c6b44d92",
    "w3": "02baaa1892a4294f3175d86010d5d80b75ad4bb3cf601182367849decf936423",
    "w4": "8a09160bfb0f81606b80e0a31da09c31f125a2acb25d5b7d36b06940bbf92e48",
    "s1": "d9887c30e8b986094dfe94bee70dca8ef3c45cc3b0589c3dd5eff630d459995f",
    "s2": "60b89066ca8517facbf67c93f1ab4b45d40640b69f40f1fd3243e8c4742a75c4",
    "s4": "666fa737cf86c02b05b4358dc9e8c9cb6b259c9a785cde4522d55c38e436278a",
    "s8": "08b24374efe2fa2e1982899531881192bfa1b38cf896c6235af4d54ce3fa2527",
    "s16": "5076e1a27de77d7828b2b463f08c0d9de9b1c923ab09e8c27ee90e8c50903a40",
    "s32": "1deb0ee53a1b84f2afde46de446cfc288b7c3bafa7e4d232a98c0dc34b21b498",
    "s64": "16b749918a664b2090379df88142acc746e54447ad385fd7d11c96ab69ed22ca",
}


def fingerprint(workload: Workload) -> str:
    """SHA-256 over the prompts of the first four repetitions."""
    prompts = [workload.prompts(repetition) for repetition in range(4)]
    return hashlib.sha256(json.dumps(prompts, separators=(",", ":")).encode()).hexdigest()


def check(workload: Workload) -> None:
    """Refuse to measure with ids that are not the committed ones.

    Raises:
        RuntimeError: this numpy makes other ids.
    """
    found, expected = fingerprint(ALL[workload.name]), SHA256[workload.name]
    if found != expected:
        raise RuntimeError(
            f"the token ids of {workload.name} have hash {found}, expected {expected}: numpy {np.__version__} draws "
            "other numbers from the same seed, or the generator was changed."
        )


def as_file(num_repetitions: int) -> dict[str, Any]:
    """All workloads in the form that `quire bench throughput --workload` reads."""
    content: dict[str, Any] = {"model": MODEL, "vocab": [VOCAB_LOW, VOCAB_HIGH], "greedy": True, "ignore_eos": True}
    for workload in WORKLOADS.values():
        reps = [workload.prompts(repetition) for repetition in range(num_repetitions)]
        content[workload.name] = {"out_lens": list(workload.output_lens), "reps": reps}
    return content


def main() -> None:
    """Write the workloads to a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workloads.cpu_smollm2", description="Write workloads.")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--reps", type=int, default=4, help="repetitions, the warm-up included (default: 4)")
    args = parser.parse_args()
    for workload in WORKLOADS.values():
        check(workload)
    args.out.write_text(json.dumps(as_file(args.reps), separators=(",", ":")))


if __name__ == "__main__":
    main()
