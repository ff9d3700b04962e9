"""Named workloads of the KV write."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Rows written, as (query length, context after the step) per sequence; T and S padded to the given sizes."""

    name: str
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_tokens: int
    num_seqs: int
    page_size: int = 16


CASES: tuple[Case, ...] = (
    Case("one row", (1,), (20,), 1, 1),
    Case("padding", (3, 1), (3, 50), 8, 4),
    Case("chunk across pages", (40, 1), (100, 17), 64, 8),
    Case("page 8", (9, 2), (9, 33), 16, 2, page_size=8),
)
