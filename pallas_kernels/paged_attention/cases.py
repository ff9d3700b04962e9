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
