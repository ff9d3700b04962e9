"""The memory ledger: how many KV blocks fit, computed from what XLA says of the largest executable, not guessed or
profiled.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import jax

from engine.config import CacheConfig
from engine.errors import OutOfMemoryError

CPU_KV_BYTES = 2 << 30  # enough for 90k tokens of a 135M model in bfloat16; a host has other tenants
CPU_MEMORY_FRACTION = 0.25
MIB = 1 << 20


@dataclass(frozen=True)
class MemoryLedger:
    """Where the memory goes, in bytes.

    Attributes:
        limit: what the engine may use in total.
        weights: parameters.
        temporaries: work space of the largest executable, outputs included; 0 as long as it is not known.
        state: everything that persists besides weights and KV.
        block: one KV block, all layers.
        num_blocks: KV blocks, the null block included.
    """

    limit: int
    weights: int
    temporaries: int
    state: int
    block: int
    num_blocks: int

    @property
    def kv(self) -> int:
        """Bytes of all KV blocks."""
        return self.block * self.num_blocks

    @property
    def total(self) -> int:
        """Bytes in use at the worst moment."""
        return self.weights + self.temporaries + self.state + self.kv

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "work space": self.temporaries,
            "state": self.state,
            f"KV ({self.num_blocks} blocks)": self.kv,
        }
        text = " + ".join(f"{name} {value / MIB:,.0f} MiB" for name, value in parts.items() if value)
        return f"{text} = {self.total / MIB:,.0f} of {self.limit / MIB:,.0f} MiB"


def memory_limit(config: CacheConfig, reserved: float) -> int:
    """Bytes that the engine may use on the first device (GPU) or in the host's memory (CPU).

    Args:
        reserved: fraction of a GPU's memory that JAX has taken, see `reserve_gpu_memory`.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    stats = device.memory_stats() or {}
    return gpu_memory_limit(stats.get("bytes_limit", 0), config.gpu_memory_utilization, reserved)


def gpu_memory_limit(allocator_bytes: int, utilization: float, reserved: float) -> int:
    """Bytes of `utilization` times the whole memory, of which the allocator has `reserved`, and no more than that."""
    return int(allocator_bytes * min(1.0, utilization / reserved))


def plan_blocks(
    config: CacheConfig,
    *,
    limit: int,
    weights: int,
    temporaries: int,
    state: int,
    block: int,
    useful_blocks: int,
    on_cpu: bool,
) -> MemoryLedger:
    """How many blocks to allocate.

    Args:
        useful_blocks: more than this could never be used (all rows at the longest length), so a small model takes no
            more.
        on_cpu: a host's memory is shared with others: the cache takes a part of it.
        (others): as in `MemoryLedger`.
    """
    if config.num_gpu_blocks_override is not None:
        blocks = config.num_gpu_blocks_override
    else:
        room = config.kv_cache_memory_bytes
        if room is None:
            room = limit - weights - temporaries - state
            if on_cpu:
                room = min(room, CPU_KV_BYTES, int(limit * CPU_MEMORY_FRACTION))
        blocks = max(0, min(room // block, useful_blocks + 1))
    return MemoryLedger(limit, weights, temporaries, state, block, blocks)


def leaves_much(ledger: MemoryLedger) -> bool:
    """Whether a quarter of a host's memory is left beside all that is known: then the number of KV blocks, which has
    other limits there, is the same whatever the largest executable takes.
    """
    return jax.devices()[0].platform == "cpu" and ledger.limit - ledger.total >= ledger.limit // 4


def require_one_request(ledger: MemoryLedger, *, max_model_len: int, block_size: int) -> None:
    """Check that a request of `max_model_len` can run alone.

    Raises:
        OutOfMemoryError: it cannot; the message names the longest length that would.
    """
    usable = ledger.num_blocks - 1
    needed = -(-max_model_len // block_size)
    if usable >= needed:
        return
    fits = max(0, usable) * block_size
    raise OutOfMemoryError(
        f"One request of max_model_len={max_model_len} tokens needs {needed} KV blocks "
        f"({needed * ledger.block / MIB:,.0f} MiB), but only {max(0, usable)} fit ({ledger}). "
        + (
            f"Set max_model_len={fits} or less, or give the KV cache more memory."
            if fits
            else "Nothing fits: use a smaller model or dtype."
        )
    )
