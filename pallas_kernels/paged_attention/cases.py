"""Named workloads of paged attention, shared by tests, benchmarks and the tuner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """One ragged batch.

    Attributes:
        name: says what it is for.
        query_lens: new tokens of each sequence.
        context_lens: tokens in the cache after this step, per sequence; at least the query length.
        num_heads, num_kv_heads, head_dim, page_size: H, K, D, P.
        window, soft_cap, sinks: options of the call; sinks: whether heads have one.
        num_tokens, num_seqs: the bucket, padding included; 0 = no padding.
        max_blocks: width of the block tables; 0 = as long as needed.
    """

    name: str
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    page_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    num_tokens: int = 0
    num_seqs: int = 0
    max_blocks: int = 0

    @property
    def padded_tokens(self) -> int:
        """T."""
        return self.num_tokens or sum(self.query_lens)

    @property
    def padded_seqs(self) -> int:
        """S."""
        return self.num_seqs or len(self.query_lens)

    def block_tables(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """int32[S, B] with permuted pages, and the number of pages (null page included)."""
        needed = [-(-c // self.page_size) for c in self.context_lens]
        width = self.max_blocks or max(needed)
        pages = rng.permutation(sum(needed)) + 1
        tables = np.zeros((self.padded_seqs, width), np.int32)
        offset = 0
        for row, count in enumerate(needed):
            tables[row, :count] = pages[offset : offset + count]
            offset += count
        return tables, sum(needed) + 1


def _decode(name: str, contexts: tuple[int, ...], **changes: object) -> Case:
    return Case(name, (1,) * len(contexts), contexts, **changes)  # type: ignore[arg-type]


CASES: tuple[Case, ...] = (
    _decode("decode one", (1,)),
    _decode("decode page boundary", (16, 17, 15, 32)),
    _decode("decode ragged, padded", (5, 700, 33, 129, 128, 1), num_tokens=8, num_seqs=8, max_blocks=64),
    _decode("decode long", (1500, 3)),
    _decode("decode window", (5, 40, 300, 128), window=24),
    _decode("decode many", tuple(range(1, 41)), num_tokens=64, num_seqs=64, num_heads=4, num_kv_heads=4, head_dim=16),
    Case("prefill whole", (70,), (70,)),
    Case("prefill chunk", (130,), (700,), num_tokens=256, num_seqs=8, max_blocks=64),
    Case("prefill window", (200,), (600,), window=50),
    Case("mixed", (5, 1, 9, 1, 200, 4), (30, 200, 9, 64, 700, 4), num_tokens=256, num_seqs=8, max_blocks=64),
    Case("mixed window", (140, 1, 3, 150), (140, 90, 333, 400), window=37, num_tokens=512, num_seqs=8),
    Case("drafts", (4, 2, 1, 3), (50, 333, 7, 3)),
    Case("soft cap", (20, 1), (20, 77), soft_cap=5.0),
    Case("sinks", (20, 1, 1), (20, 77, 1), sinks=True, num_tokens=32, num_seqs=4),
    Case("sinks, window", (90, 1), (300, 130), sinks=True, window=40),
    Case("one head", (3, 40), (90, 40), num_heads=1, num_kv_heads=1, head_dim=24, page_size=8),
    Case("mqa, large group", (1, 33), (500, 33), num_heads=32, num_kv_heads=1, head_dim=128),
    Case("page 32", (1, 50), (95, 50), page_size=32, num_heads=8, num_kv_heads=2, head_dim=80),
)

# For kernels in the simulator of a GPU, where a block of threads takes a good part of a second.
TINY_CASES: tuple[Case, ...] = (
    _decode("decode", (1, 17, 64, 65, 200), num_tokens=8, num_seqs=6, max_blocks=16),
    _decode("decode, one head per group", (16, 130), num_heads=2, num_kv_heads=2),
    _decode("decode, window", (5, 40, 300, 128), window=24, num_heads=4, num_kv_heads=1),
    _decode("decode, page 32", (33, 100), page_size=32, num_heads=8, num_kv_heads=1),
    Case("drafts", (4, 2, 1, 3), (150, 83, 7, 3), num_heads=6, num_kv_heads=2, num_tokens=16, num_seqs=5),
    Case("mixed", (5, 1, 40, 1, 9), (130, 70, 100, 64, 9), num_heads=4, num_kv_heads=1, num_tokens=64, num_seqs=8),
    Case("prefill", (70,), (70,), num_heads=6, num_kv_heads=2),
    Case("prefill, window", (90,), (200,), window=50, num_heads=2, num_kv_heads=1),
    Case("soft cap", (20, 1), (20, 77), soft_cap=5.0, num_heads=3, num_kv_heads=1),
    Case("sinks", (20, 1, 1), (20, 77, 1), sinks=True, num_heads=6, num_kv_heads=2, num_tokens=32, num_seqs=4),
    Case("sinks, window", (30, 1), (100, 130), sinks=True, window=40, num_heads=3, num_kv_heads=1),
    Case("large group", (1, 3), (150, 3), num_heads=71, num_kv_heads=1),
)


def _llama(name: str, query_lens: tuple[int, ...], context_lens: tuple[int, ...]) -> Case:
    return Case(
        f"{name}, Llama-3.1-8B", query_lens, context_lens, num_heads=32, num_kv_heads=8, head_dim=128, max_blocks=2048
    )


def _qwen(name: str, query_lens: tuple[int, ...], context_lens: tuple[int, ...]) -> Case:
    return Case(
        f"{name}, Qwen3-0.6B", query_lens, context_lens, num_heads=16, num_kv_heads=8, head_dim=128, max_blocks=2048
    )


def _smollm(name: str, query_lens: tuple[int, ...], context_lens: tuple[int, ...]) -> Case:
    return Case(f"{name}, SmolLM2-135M", query_lens, context_lens, max_blocks=512)


def _uneven(count: int, mean: int) -> tuple[int, ...]:
    """Context lengths from half to one and a half of the mean, in no order."""
    return tuple(mean // 2 + mean * ((i * 37) % count) // count for i in range(count)) if count > 1 else (mean,)


# For a GPU: what is compiled, timed and tuned.
GPU_CASES: tuple[Case, ...] = (
    *(
        make(f"decode, {count} x {mean}", (1,) * count, _uneven(count, mean))
        for make in (_llama, _qwen)
        for count, mean in ((1, 1024), (1, 16384), (8, 1024), (32, 4096), (64, 1024), (64, 8192), (256, 1024))
    ),
    *(_smollm(f"decode, {count} x 1024", (1,) * count, _uneven(count, 1024)) for count in (1, 16, 128)),
    *(make(f"prefill, {length}", (length,), (length,)) for make in (_llama, _qwen, _smollm) for length in (2048, 8192)),
    _llama("prefill, last 2048 of 32768", (2048,), (32768,)),
    _llama("drafts, 32 x 5, 4096", (5,) * 32, _uneven(32, 4096)),
    _llama("mixed, 2048 and 63 x 4096", (2048, *(1,) * 63), (4096, *_uneven(63, 4096))),
)
