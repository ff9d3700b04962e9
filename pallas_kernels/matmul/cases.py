"""Named workloads of the matrix product: SmolLM2-135M's and an 8B model's layers at decode and prefill row counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """[m, k] times [k, n], or [n, k] if transposed."""

    name: str
    m: int
    k: int
    n: int
    transposed: bool = False


CASES: tuple[Case, ...] = (
    Case("one row", 1, 576, 960),
    Case("two rows", 2, 576, 3072),
    Case("odd rows", 7, 1536, 576),
    Case("head, one row", 1, 576, 4096, transposed=True),
    Case("head", 8, 576, 4096, transposed=True),
    Case("prefill", 256, 576, 3072),
)
