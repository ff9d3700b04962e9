"""Named workloads of the grouped product, shared by tests, benchmarks and the tuner."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Rows of each expert; `padding` rows of no expert follow. `kind` and `group_size` as in `quantized_matmul`, or
    "dense".
    """

    name: str
    group_sizes: tuple[int, ...]
    k: int
    n: int
    kind: str = "dense"
    group_size: int = -1
    padding: int = 0

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.group_sizes) + self.padding


CASES: tuple[Case, ...] = (
    Case("one row", (0, 0, 1, 0), 64, 48),
    Case("decode", (1, 0, 2, 1, 0, 0, 3, 1), 96, 64),
    Case("padding", (3, 0, 0, 9), 64, 32, padding=4),
    Case("all rows to one expert", (0, 17, 0, 0), 64, 32),
    Case("nothing", (0, 0, 0), 64, 32, padding=2),
    Case("prompt", (30, 70, 1, 27), 128, 96),
    Case("int8", (1, 0, 2, 1), 128, 64, "w8a16"),
    Case("fp8, group 64", (5, 3, 0), 128, 64, "w8a16_fp8", 64, padding=1),
    Case("int4, group 32", (2, 0, 14), 128, 64, "w4a16", 32),
    Case("w8a8", (0, 4, 3), 128, 64, "w8a8", padding=1),
    Case("fp8 x fp8, groups", (6, 1, 9), 256, 64, "w8a8_fp8", 128),
)


def _balanced(name: str, num_tokens: int, num_experts: int, k: int, n: int, kind: str, group_size: int) -> Case:
    sizes = tuple(num_tokens // num_experts + (e < num_tokens % num_experts) for e in range(num_experts))
    return Case(f"{name} {k}x{n} {kind} T={num_tokens}", sizes, k, n, kind, group_size)


# Qwen3-30B-A3B: 128 experts, 8 a token; gate/up and down projections, at 1, 32 and 2048 tokens a step.
GPU_CASES: tuple[Case, ...] = tuple(
    _balanced("Qwen3-30B-A3B", tokens * 8, 128, k, n, kind, group_size)
    for k, n in ((2048, 1536), (768, 2048))
    for kind, group_size in (("dense", -1), ("w4a16", 128), ("w8a8_fp8", 128))
    for tokens in (1, 32, 2048)
)
