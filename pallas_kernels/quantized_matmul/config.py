"""Tile sizes of the Hopper kernel: which are possible, which are guessed, and the key under which they are tuned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import jax.numpy as jnp

from pallas_kernels.device import Device
from pallas_kernels.mosaic import SMEM_LIMIT, bits_of
from pallas_kernels.quantized_matmul.problem import QuantizedMatmulProblem
from pallas_kernels.tuning import tuned_entries

OP_NAME = "quantized_matmul"
WARPGROUPS = 2  # that compute; a third one copies
MMA_ROWS = 64  # of one warpgroup's tensor core instruction: outputs here, as weights are its left operand
# Of 8-bit floats, whose products a tensor core adds in about 14 bits before they are added in float32; DeepSeek-V3's
# interval (arXiv 2412.19437, section 3.3.2).
PROMOTED_INPUTS = 128
_RESERVE = 4096  # bytes of shared memory for barriers and alignment
_ACCUMULATORS = 128  # registers of a thread for sums (of 232 that a thread has): more spill


@dataclass(frozen=True)
class TileConfig:
    """Tiles of one block, which computes `outputs` x `rows` of the result, transposed: weights are the left operand.

    Attributes:
        rows: activations' rows, the N of a tensor core instruction: 8, 16, 32, 64 or 128.
        outputs: of a block, shared among two warpgroups: 128 or 256.
        inputs: of one step along K.
        stages: steps in flight.
        splits: parts of K that different blocks sum, added up afterwards.
        scale_weights: of groups, whether their scales multiply the weights, rounded to bfloat16, and not the float32
            products: fewer operations once a tile has more rows than a group has inputs, and half the registers.
    """

    rows: int
    outputs: int
    inputs: int
    stages: int
    splits: int = 1
    scale_weights: bool = False

    def refuses(self, problem: QuantizedMatmulProblem) -> str | None:
        """None, or the reason why these tiles cannot run the problem."""
        if problem.n % self.outputs:
            return f"{problem.n} outputs are not a multiple of {self.outputs}"
        if problem.k % (self.inputs * self.splits):
            return f"{problem.k} inputs are not a multiple of {self.inputs} x {self.splits} splits"
        group = problem.group_size
        if group > 0 and (max(group, self.inputs) % min(group, self.inputs) or problem.k // self.splits % group):
            return f"groups of {group} do not align with steps of {self.inputs} in {self.splits} splits"
        if problem.rule.activations is not None and 0 < group < self.inputs:
            return f"groups of {group} are shorter than a step of {self.inputs}"
        if self.scale_weights and (not problem.in_groups or problem.rule.activations or problem.dtype != "bfloat16"):
            return "only bfloat16 activations meet weights that are scaled by groups"
        if problem.is_promoted and self.inputs > PROMOTED_INPUTS:
            return f"a step of {self.inputs} inputs is longer than the {PROMOTED_INPUTS} that are added in float32"
        twice = problem.is_promoted or (problem.in_groups and not self.scale_weights)  # a step's own, and all
        sums = self.rows * self.outputs // WARPGROUPS // 128 * (2 if twice else 1)
        if sums > _ACCUMULATORS:
            return f"{sums} registers a thread for sums, more than {_ACCUMULATORS}"
        if self.size_bytes(problem) > SMEM_LIMIT:
            return f"{self.size_bytes(problem)} bytes of shared memory, more than {SMEM_LIMIT}"
        return None

    def size_bytes(self, problem: QuantizedMatmulProblem) -> int:
        """Shared memory of a block."""
        result = 4 if self.splits > 1 else jnp.dtype(problem.out_dtype).itemsize
        return self.stages * self.stage_bytes(problem) + self.rows * self.outputs * result + _RESERVE

    def stage_bytes(self, problem: QuantizedMatmulProblem) -> int:
        """Shared memory of one step."""
        kind = problem.rule
        wide = bits_of(kind.activations or problem.dtype)
        groups = max(1, self.inputs // problem.group_size) if problem.group_size > 0 else 1
        tiles = (self.outputs * kind.bits + self.rows * wide) * self.inputs // 8
        if not problem.in_groups:
            return tiles
        vectors = groups * self.outputs * (jnp.dtype(problem.scale_dtype).itemsize + 1) + self.rows * 4
        return tiles + -(-vectors // 1024) * 1024


def key(problem: QuantizedMatmulProblem) -> str:
    """Of a table of tuned configurations; row counts up to the next power of two share one."""
    rows = 1 << (problem.m - 1).bit_length()
    zero_points = " zp" if problem.zero_points else ""
    return f"m{rows} k{problem.k} n{problem.n} {problem.kind} g{problem.group_size}{zero_points} {problem.dtype}"


def heuristic(problem: QuantizedMatmulProblem, device: Device) -> TileConfig:
    """A guess. Few rows: reading weights is all the time there is, so all cores read, with as many bytes in flight as
    there is room for. Many rows: the largest tile whose sums fit in registers.
    """
    both_narrow = problem.rule.activations is not None
    rows = min(max(8, 1 << (problem.m - 1).bit_length()), 128)
    inputs = 128 if problem.k % 128 == 0 else 64
    if both_narrow and problem.group_size > 0:
        inputs = min(inputs, problem.group_size)
    scale_weights = rows == 128 and problem.in_groups and not both_narrow and problem.dtype == "bfloat16"
    # Scaled, or promoted, one by one: twice the registers.
    products = problem.is_promoted or (problem.in_groups and not scale_weights)
    if products and 0 < problem.group_size < inputs:
        rows = min(rows, 64)
    row_tiles, outputs = -(-problem.m // rows), 128
    if rows == 128 and not products and problem.n % 256 == 0 and row_tiles * problem.n >= 256 * device.num_cores:
        outputs = 256  # enough tiles for all cores, and room for their sums
        inputs = inputs if both_narrow else 64
    splits = _splits(problem, problem.n // outputs * row_tiles, inputs, device.num_cores)
    return with_stages(TileConfig(rows, outputs, inputs, 1, splits, scale_weights), problem)


def with_stages(tiles: TileConfig, problem: QuantizedMatmulProblem) -> TileConfig:
    """The tiles with as many stages as there is room for, at most 8 or the steps."""
    draft = replace(tiles, stages=1)
    room = 1 + (SMEM_LIMIT - draft.size_bytes(problem)) // draft.stage_bytes(problem)
    steps = problem.k // tiles.inputs // tiles.splits
    return replace(tiles, stages=max(2, min(8, room, steps)))


def _splits(problem: QuantizedMatmulProblem, blocks: int, inputs: int, num_cores: int) -> int:
    """The fewest parts of K with which cores are nearly as busy as they can be."""
    align = math.lcm(inputs, max(problem.group_size, 1))
    most = 8 if problem.m <= 64 else 4  # parts of many rows are many bytes to add up
    fit = [s for s in (1, 2, 4, 8) if s <= most and problem.k % (align * s) == 0 and problem.k // inputs // s >= 4] or [
        1
    ]
    if blocks >= num_cores and problem.m > 64:
        return 1
    busy = {s: blocks * s / (-(-blocks * s // num_cores) * num_cores) for s in fit}
    return next(s for s in fit if busy[s] >= 0.95 * max(busy.values()))


def search_space(problem: QuantizedMatmulProblem) -> Iterator[TileConfig]:
    """What the tuner tries."""
    most = max(8, 1 << (problem.m - 1).bit_length())
    sizes = ((8, 16, 32, 64, 128), (128, 256), (64, 128, 256), (2, 3, 4, 6, 8), (1, 2, 4, 8), (False, True))
    for rows, outputs, inputs, stages, splits, scale_weights in product(*sizes):
        config = TileConfig(rows, outputs, inputs, stages, splits, scale_weights)
        if rows > most or (rows < 64 and rows < most) or (splits > 1 and most > 128) or (scale_weights and rows < 64):
            continue
        if stages <= problem.k // inputs // splits and config.refuses(problem) is None:
            yield config


def prefers_xla(problem: QuantizedMatmulProblem, device: Device) -> str | None:
    """None, or the reason why XLA should run a problem that the kernel could.

    Measured times decide where the tuner left some (`us` of the kernel, `xla_us`). Otherwise: XLA fuses the conversion
    of weights with one scale per output into its matrix product, but materializes 16-bit weights where groups have
    scales.
    """
    entry = tuned_entries(OP_NAME, device.slug).get(key(problem))
    if entry is not None and "xla_us" in entry:
        slower = entry["us"] > entry["xla_us"]
        return f"measured {entry['us']} us, XLA {entry['xla_us']} us" if slower else None
    if problem.group_size < 0:
        return "XLA fuses scales per output into its own product, and nothing else was measured here"
    return None
