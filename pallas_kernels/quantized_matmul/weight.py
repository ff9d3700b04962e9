"""`QuantizedWeight`: the one form in which packed weights lie on a device, and how it is made once, at load.

    value[k, n] = (stored[n, k] - zero_points[g, n]) * scales[g, n] + offsets[g, n],    g = k // group_size

- `stored` is `[N, K]` with K minor. A tensor core instruction of Hopper with 8-bit operands takes both of them K-minor
  and no other way; a weight-only kernel reads it as the left operand, converted in registers, with no transposition
  anywhere; a CPU's dot runs as fast on it as on `[K, N]` from two rows on, and a group's numbers lie side by side.
- 4-bit weights are jax's native int4: two numbers a byte on a device, and loads, slices and conversions that XLA and
  Mosaic understand. A format of checkpoints with an order of nibbles of its own ends at load.
- Unsigned numbers become signed ones (4 bits: minus 8), with zero points moved by as much.
- `scales` is `[G, N]` with N minor for every kind: one row is what a tile of outputs needs at one step along K, 16
  aligned bytes that a bulk copy can fetch. Scales of a tensor, of a shard of fused weights or of 128x128 blocks are
  repeated along N: 3 % more bytes for blocks, and no rule about shards that end inside a block.
- Scales keep the checkpoint's dtype (float32, bfloat16, float16) and may be negative.
- Inputs may be turned in blocks (`rotation.py`): then the stored matrix is the turned one.
- Groups lie side by side. Where a checkpoint's do not (activation order), inputs are put in the groups' order once, at
  load, and `input_order` says which activation meets which.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.e4m3 import least_error_scales
from pallas_kernels.quantized_matmul.rotation import rotate


@dataclass(frozen=True)
class Kind:
    """A way of storing weights and of meeting activations.

    Attributes:
        dtype: of stored numbers.
        bits: of one of them.
        largest: largest magnitude that rounding to nearest gives out.
        activations: dtype to which activations are quantized at run time; None = they stay 16-bit floats.
    """

    dtype: str
    bits: int
    largest: float
    activations: str | None = None


KINDS: dict[str, Kind] = {
    "w8a16": Kind("int8", 8, 127.0),
    "w8a16_fp8": Kind("float8_e4m3fn", 8, 448.0),
    "w4a16": Kind("int4", 4, 7.0),
    "w8a8": Kind("int8", 8, 127.0, "int8"),
    "w8a8_fp8": Kind("float8_e4m3fn", 8, 448.0, "float8_e4m3fn"),
}
DENSE = "dense"  # in the place of a kind: weights that are not packed
GROUP_SIZES = (-1, 16, 32, 64, 128)
SCALE_DTYPES = ("float32", "bfloat16", "float16")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StaticActivations:
    """Activations of a kind that quantizes them, by one scale for all tokens that was measured beforehand:
    `number = round(x / scale) + zero_point`, kept in the range of the dtype.

    Attributes:
        scale: float32[].
        zero_point: int32[], or None for 0 (integers only).
        sums: int32[N], sums of the stored weights of each output, which the zero point is multiplied with; None without
            one.
    """

    scale: jax.Array
    zero_point: jax.Array | None = None
    sums: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A packed `[K, N]` matrix, or E of them.

    Attributes:
        stored: [..., N, K] in the kind's dtype.
        scales: [..., G, N] float32, bfloat16 or float16.
        zero_points: int8[..., G, N], or None if all are 0.
        kind: key of `KINDS`.
        group_size: inputs that share a scale; -1 = all K of them.
        offsets: [..., G, N] like scales, or None if all are 0.
        input_order: int32[K]: row k of the packed matrix meets activation `input_order[k]`; None = in order.
        static: how activations are quantized; None = by each token's largest (kinds that quantize them at all).
        input_limit: activations are kept between minus and plus this much before they are quantized; None = as they
            are.
        rotation: inputs of a block that are turned together (`rotation.rotate`) once they are in order and limited;
            0 = none.
    """

    stored: jax.Array
    scales: jax.Array
    zero_points: jax.Array | None
    kind: str = field(metadata={"static": True})
    group_size: int = field(metadata={"static": True})
    offsets: jax.Array | None = None
    input_order: jax.Array | None = None
    static: StaticActivations | None = None
    input_limit: float | None = field(default=None, metadata={"static": True})
    rotation: int = field(default=0, metadata={"static": True})

    @property
    def k(self) -> int:
        """Inputs."""
        return self.stored.shape[-1]

    @property
    def n(self) -> int:
        """Outputs."""
        return self.stored.shape[-2]

    @property
    def bits(self) -> int:
        """Of a stored number."""
        return KINDS[self.kind].bits

    @property
    def size_bytes(self) -> int:
        """On a device."""
        others = jax.tree.leaves(replace(self, stored=None))  # type: ignore[arg-type]
        return self.stored.size * self.bits // 8 + sum(leaf.size * leaf.dtype.itemsize for leaf in others)


def repack(
    stored: jax.Array,
    scales: jax.Array,
    zero_points: jax.Array | None = None,
    *,
    kind: str,
    group_size: int = -1,
    rows_per_scale: int = 1,
    offsets: jax.Array | None = None,
) -> QuantizedWeight:
    """A `QuantizedWeight` of a checkpoint's numbers, once they are unpacked to one array element each.

    Args:
        stored: [..., N, K]; any dtype that holds the kind's numbers exactly; signed.
        scales: [..., ceil(N / rows_per_scale), G], or anything that broadcasts to it ([], [1], [N, 1]).
        zero_points: like scales, integers in the range of signed numbers of as many bits; None = 0.
        kind: key of `KINDS`.
        group_size: one of `GROUP_SIZES`; must divide K.
        rows_per_scale: outputs that share a row of scales (128 for blocks of 128x128; the last block may be short).
        offsets: like scales; None = 0.

    Raises:
        ValueError: what the kind, group size or a shape cannot be.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group size {group_size} is none of {', '.join(map(str, GROUP_SIZES))}")
    n, k = stored.shape[-2:]
    if group_size > 0 and k % group_size:
        raise ValueError(f"{k} inputs are not a multiple of the group size {group_size}")
    if not (zero_points is None and offsets is None) and KINDS[kind].activations is not None:
        raise ValueError(f"{kind} has no zero points and offsets: its products are those of the stored numbers")
    if str(scales.dtype) not in SCALE_DTYPES:
        raise ValueError(f"scales are {scales.dtype}, not one of {', '.join(SCALE_DTYPES)}")
    shape = (*stored.shape[:-2], -(-n // rows_per_scale), 1 if group_size < 0 else k // group_size)

    def lay_out(rows: jax.Array) -> jax.Array:
        """[..., ceil(N / rows_per_scale), G] -> [..., G, N]."""
        repeated = jnp.repeat(jnp.broadcast_to(rows, shape), rows_per_scale, axis=-2)[..., :n, :]
        return jnp.swapaxes(repeated, -1, -2)

    zeros = None if zero_points is None else lay_out(zero_points).astype(jnp.int8)
    moved = None if offsets is None else lay_out(offsets)
    return QuantizedWeight(stored.astype(KINDS[kind].dtype), lay_out(scales), zeros, kind, group_size, moved)


def with_static_activations(weight: QuantizedWeight, scale: jax.Array, zero_point: jax.Array | None) -> QuantizedWeight:
    """The weight whose activations are quantized by a scale that was measured beforehand.

    Args:
        weight: of a kind that quantizes activations, without groups.
        scale: float[].
        zero_point: integer[] in the range of int8, or None for 0; of integers only.

    Raises:
        ValueError: the kind or its groups do not allow it.
    """
    activations = KINDS[weight.kind].activations
    if activations is None or weight.group_size > 0:
        raise ValueError(f"{weight.kind} in groups of {weight.group_size} has no static scale of activations")
    if zero_point is None:
        return replace(weight, static=StaticActivations(scale.astype(jnp.float32)))
    if activations != "int8":
        raise ValueError(f"{weight.kind} has no zero point of activations: its numbers are floats")
    sums = weight.stored.astype(jnp.int32).sum(-1)
    return replace(weight, static=StaticActivations(scale.astype(jnp.float32), zero_point.astype(jnp.int32), sums))


def from_dense(
    weight: jax.Array,
    kind: str,
    group_size: int = -1,
    *,
    zero_points: bool = False,
    rows_per_scale: int = 1,
    scale_dtype: Any = jnp.float32,
    rotation: int = 0,
    num_scales: int = 1,
    importance: jax.Array | None = None,
) -> QuantizedWeight:
    """Rounds dense weights to the nearest numbers: `weight * (1 / scale)` with `scale = largest weight * (1 / largest
    number)`. XLA makes products of divisions by what many elements share, on some devices and in some fusions; written
    as products, the result is the same bits everywhere.

    Args:
        weight: [..., K, N].
        kind, group_size, rows_per_scale: see `repack`.
        zero_points: whether a group's range may lie off zero (integers only).
        scale_dtype: of the scales; numbers are rounded with the scales as stored.
        rotation: inputs of a block that are turned together; 0 = none.
        num_scales: candidates among which each scale is chosen by the squared error (floats only); 1 = none.
        importance: float[K], of each input's squared errors; None = all alike.

    Raises:
        ValueError: as in `repack`; or a rotation or candidates that the kind or K does not have.
    """
    wide = jnp.swapaxes(weight.astype(jnp.float32), -1, -2)
    n, k = wide.shape[-2:]
    size = k if group_size < 0 else group_size
    if kind not in KINDS or k % size:
        return repack(wide, jnp.ones((), scale_dtype), kind=kind, group_size=group_size)  # which says what is wrong
    rule, rows = KINDS[kind], -(-n // rows_per_scale)
    is_int = rule.dtype.startswith("int")
    if zero_points and not is_int:
        raise ValueError(f"{kind} has no zero points: its numbers are floats")
    if num_scales > 1 and is_int:
        raise ValueError(f"{kind} has no scales to choose among: its numbers are integers")
    wide = rotate(wide, rotation) if rotation else wide
    padded = jnp.pad(wide, [(0, 0)] * (wide.ndim - 2) + [(0, rows * rows_per_scale - n), (0, 0)])
    blocks = padded.reshape(*wide.shape[:-2], rows, rows_per_scale, k // size, size)
    scale, zero = _scales(blocks, rule, zero_points, scale_dtype if num_scales == 1 else jnp.float32)
    if num_scales > 1:
        weights = None if importance is None else importance.astype(jnp.float32).reshape(-1, size)
        scale = least_error_scales(blocks, scale, weights, scale_dtype, num_scales)
    inverse = 1.0 / jnp.where(scale == 0, 1.0, scale.astype(jnp.float32))
    zero = jnp.zeros_like(inverse) if zero is None else zero
    numbers = blocks * inverse[..., :, None, :, None] + zero[..., :, None, :, None]
    smallest = -(2.0 ** (rule.bits - 1)) if zero_points else -rule.largest
    numbers = jnp.clip(jnp.round(numbers) if is_int else numbers, smallest, rule.largest)
    stored = numbers.reshape(padded.shape)[..., :n, :]
    zeros = zero if zero_points else None
    packed = repack(stored, scale, zeros, kind=kind, group_size=group_size, rows_per_scale=rows_per_scale)
    return replace(packed, rotation=rotation)


def _scales(blocks: jax.Array, rule: Kind, zero_points: bool, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Scales in `dtype` and float32 zero points [..., R, G] of blocks [..., R, r, G, g], by their largest numbers."""
    if not zero_points:
        return (jnp.abs(blocks).max((-3, -1)) * (1.0 / rule.largest)).astype(dtype), None
    # Numbers run over the full signed range, -2^(b-1) .. 2^(b-1) - 1; 0 must be one of them.
    low, high = jnp.minimum(blocks.min((-3, -1)), 0.0), jnp.maximum(blocks.max((-3, -1)), 0.0)
    smallest, largest = -(2.0 ** (rule.bits - 1)), 2.0 ** (rule.bits - 1) - 1
    scale = ((high - low) * (1.0 / (largest - smallest))).astype(dtype)
    inverse = 1.0 / jnp.where(scale == 0, 1.0, scale.astype(jnp.float32))
    return scale, jnp.clip(jnp.round(smallest - low * inverse), smallest, largest)


def dequantize(weight: QuantizedWeight, dtype: Any = jnp.float32) -> jax.Array:
    """[..., N, K]: the values, computed in float32 and rounded once, inputs in the order of the activations."""
    groups = weight.scales.shape[-2]
    wide = weight.stored.astype(jnp.float32).reshape(*weight.stored.shape[:-1], groups, weight.k // groups)
    if weight.zero_points is not None:
        wide = wide - jnp.swapaxes(weight.zero_points, -1, -2)[..., None].astype(jnp.float32)
    wide = wide * jnp.swapaxes(weight.scales, -1, -2)[..., None].astype(jnp.float32)
    if weight.offsets is not None:
        wide = wide + jnp.swapaxes(weight.offsets, -1, -2)[..., None].astype(jnp.float32)
    wide = wide.reshape(weight.stored.shape)
    values = (rotate(wide, weight.rotation) if weight.rotation else wide).astype(dtype)
    return values if weight.input_order is None else values[..., jnp.argsort(weight.input_order)]
