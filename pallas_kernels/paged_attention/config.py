"""Tile configurations of the Mosaic GPU kernel of paged attention, and which of them a call gets.

A row's bits depend on `kv_block`, `split_tokens` and `max_splits` alone, so these are functions of the problem and
never of how many rows a step has: a sequence gets the same result in a step of decode rows and in one mixed with
prompts. The other fields only decide how fast that result comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pallas_kernels.device import Device
from pallas_kernels.kv_layout import QUANTIZED
from pallas_kernels.mosaic import SMEM_LIMIT, bits_of
from pallas_kernels.paged_attention.problem import AttentionProblem
from pallas_kernels.tuning import choose_config

OP_NAME = "paged_attention"
WARPGROUP_ROWS = 64  # query rows of one compute warpgroup: M of a wgmma
FEW_TOKENS = 256  # steps with at most as many token rows are taken for decode steps
ALIGNMENT = 1024  # of buffers
RESERVED_BYTES = 4096  # more than barriers and what the compiler keeps for reductions take


@dataclass(frozen=True)
class AttentionConfig:
    """How the kernel cuts its work.

    Attributes:
        kv_block: keys per trip; a multiple of 64 and of the page size.
        stages: blocks of keys and of values that are under way at a time.
        compute_warpgroups: 1 or 2, each with 64 query rows of a tile; they share the tile's keys and values.
        query_buffers: 2 loads a tile's queries while the tile before is computed.
        split_tokens: shortest split of a context, a multiple of `kv_block`.
        max_splits: longest contexts are cut into as many splits, which then are longer; 1 = never split.
    """

    kv_block: int = 64
    stages: int = 3
    compute_warpgroups: int = 1
    query_buffers: int = 2
    split_tokens: int = 512
    max_splits: int = 8

    def __post_init__(self) -> None:
        if self.kv_block % 64:
            raise ValueError(f"kv_block must be a multiple of 64, not {self.kv_block}")
        if self.compute_warpgroups not in (1, 2) or self.query_buffers not in (1, 2):
            raise ValueError(f"compute_warpgroups and query_buffers must be 1 or 2: {self}")
        if self.split_tokens % self.kv_block or self.split_tokens < 1 or self.max_splits < 1 or self.stages < 1:
            raise ValueError(f"split_tokens must be a multiple of kv_block, all counts at least 1: {self}")

    @property
    def tile_rows(self) -> int:
        """Query rows of a tile."""
        return WARPGROUP_ROWS * self.compute_warpgroups


def columns_at_a_time(head_dim: int) -> int:
    """Columns of values and partial results that are held in registers, or staged, besides the sums."""
    return head_dim if head_dim <= 128 else 64


def needs_all_registers(problem: AttentionProblem) -> bool:
    """Whether the sums of 64 rows leave no registers for a second compute warpgroup."""
    return problem.head_dim > 128


def smem_bytes(config: AttentionConfig, problem: AttentionProblem) -> int:
    """Shared memory that the kernel takes, from above."""
    dim, block, stages = problem.head_dim, config.kv_block, config.stages
    wide, narrow = bits_of(problem.dtype) // 8, bits_of(problem.kv_dtype) // 8
    buffers = [2 * stages * block * dim * narrow, config.query_buffers * config.tile_rows * dim * wide]
    if problem.kv_dtype in QUANTIZED:
        buffers += [2 * block * dim * wide, *(stages * block // problem.page_size * 128, block * 4) * 2]
    if config.max_splits > 1:
        buffers += [WARPGROUP_ROWS * columns_at_a_time(dim) * 4, WARPGROUP_ROWS * 32]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in buffers) + RESERVED_BYTES


def key(problem: AttentionProblem, num_tokens: int) -> str:
    """What a tuned configuration belongs to."""
    rows = "few" if num_tokens <= FEW_TOKENS else "many"
    return (
        f"h{problem.num_heads}_k{problem.num_kv_heads}_d{problem.head_dim}_p{problem.page_size}"
        f"_{problem.dtype}_{problem.kv_dtype}_{rows}"
    )


def heuristic(problem: AttentionProblem, num_tokens: int) -> AttentionConfig:
    """A configuration that fits, without measurements.

    Splits: 64 blocks of threads that stream keys saturate the memory of an H200, so long contexts are cut until one
    sequence alone gives as many.
    """
    config = AttentionConfig(
        stages=6,
        compute_warpgroups=1 if num_tokens <= FEW_TOKENS or needs_all_registers(problem) else 2,
        max_splits=min(32, max(4, 64 // problem.num_kv_heads)),
    )
    while smem_bytes(config, problem) > SMEM_LIMIT and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    if smem_bytes(config, problem) > SMEM_LIMIT:
        config = replace(config, query_buffers=1)
    return config


def search_space(problem: AttentionProblem, num_tokens: int) -> Iterator[AttentionConfig]:
    """Configurations worth measuring, the heuristic's first: those that fit and give its bits, so that a tuned table
    never makes a sequence's result depend on the kind of step.
    """
    base = heuristic(problem, num_tokens)
    yield base
    for warpgroups in (1,) if needs_all_registers(problem) else (1, 2):
        for buffers in (1, 2):
            for stages in (2, 3, 4, 6):
                config = replace(base, compute_warpgroups=warpgroups, query_buffers=buffers, stages=stages)
                if config != base and smem_bytes(config, problem) <= SMEM_LIMIT:
                    yield config


def resolve(
    problem: AttentionProblem, num_tokens: int, device: Device, explicit: AttentionConfig | None
) -> AttentionConfig:
    """Explicit > tuned > heuristic."""
    return choose_config(
        OP_NAME,
        key(problem, num_tokens),
        AttentionConfig,
        device,
        explicit,
        lambda: heuristic(problem, num_tokens),
    )
