"""What a plan says. Frozen values, bytes and seconds. No jax here."""

from __future__ import annotations

from dataclasses import dataclass

EXACT, COMPILED, ESTIMATED = "exact", "compiled", "estimated"


@dataclass(frozen=True)
class WorkSpace:
    """Bytes that a step of one shape needs besides weights, state and cache, outputs included.

    Attributes:
        num_tokens, num_seqs: the shape.
        size: bytes.
        how: `COMPILED` (XLA's own figure for this machine's CPU) or `ESTIMATED` (from the shapes of a layer).
    """

    num_tokens: int
    num_seqs: int
    size: int
    how: str


@dataclass(frozen=True)
class Concurrency:
    """How many sequences of one length run at a time.

    Attributes:
        length: prompt and output together, in tokens.
        by_memory: as many have room in the KV cache.
        running: as many run: no more than `max_num_seqs`.
    """

    length: int
    by_memory: int
    running: int


@dataclass(frozen=True)
class DecodeFloor:
    """Least time of a step in which so many sequences get a token each.

    Attributes:
        num_seqs, context: the sequences, and tokens that each of them sees.
        seconds: at least.
        bound: what it is limited by: "weights" (their bytes), "products", "cache" (bytes) or "attention" (operations).
        fits: whether so many sequences of that length have room.
    """

    num_seqs: int
    context: int
    seconds: float
    bound: str
    fits: bool


@dataclass(frozen=True)
class PrefillFloor:
    """Least time to compute a prompt of so many tokens alone."""

    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class CapacityPlan:
    """A whole plan. Bytes, unless a name says otherwise.

    Attributes:
        model, device: as they were named.
        device_name, device_source: the product, and where its figures come from.
        family, num_layers, num_parameters: of the model.
        dtype, quantization, kv_cache_dtype: what activations, weights, keys and values are kept in.
        max_model_len, max_num_seqs, max_num_batched_tokens, block_size: limits, as an engine would resolve them.
        limit: what the engine may use.
        weights, state, block: exact.
        work_space: of the largest step; `buckets` has it of each shape.
        num_blocks: KV blocks that sequences can have.
        longest: tokens of the longest sequence that has room.
        concurrency, decode, prefill: see there; the floors are empty for a device without known rates.
        notes: what to know about the figures.
    """

    model: str
    device: str
    device_name: str
    device_source: str
    family: str
    num_layers: int
    num_parameters: int
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    limit: int
    weights: int
    state: int
    block: int
    work_space: WorkSpace
    buckets: tuple[WorkSpace, ...]
    num_blocks: int
    longest: int
    concurrency: tuple[Concurrency, ...]
    decode: tuple[DecodeFloor, ...]
    prefill: tuple[PrefillFloor, ...]
    notes: tuple[str, ...]

    @property
    def kv(self) -> int:
        """Bytes of the KV cache, the null block included."""
        return self.block * (self.num_blocks + 1)
