"""Integers with scales, as checkpoints hold them once they are unpacked, become a matrix on the device."""

from __future__ import annotations

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import WeightsError
from models.layers.product import Matrix
from pallas_kernels.quantized_matmul import GROUP_SIZES, repack

logger = logging.getLogger(__name__)

MOST_BITS_OF_INT4 = 4


def finite(scales: np.ndarray) -> np.ndarray:
    """The scales of a checkpoint.

    Raises:
        WeightsError: one of them is not finite.
    """
    if not np.isfinite(scales.astype(np.float32)).all():
        raise WeightsError("its scales hold numbers that are not finite.")
    return scales


def kind_of(bits: int) -> str:
    """Of weights that meet 16-bit activations: 4 bits or fewer lie in int4, up to 8 in int8."""
    return "w4a16" if bits <= MOST_BITS_OF_INT4 else "w8a16"


def groups_that_fit(group_size: int, num_inputs: int) -> int | None:
    """The largest group size of the kernels that a checkpoint's groups can be cut into; None if there is none.

    Groups of 256 are two of 128 with the same scale; of 576 inputs in groups of 128, the last of which is short, each
    is two of 64.
    """
    if group_size < 0 or group_size >= num_inputs:
        return -1
    fits = [size for size in GROUP_SIZES if size > 0 and group_size % size == 0 and num_inputs % size == 0]
    return max(fits, default=None)


def pack_integers(
    numbers: jax.Array,
    scales: jax.Array,
    zero_points: jax.Array | None,
    *,
    bits: int,
    group_size: int,
    dtype: np.dtype,
    group_of: np.ndarray | None = None,
    offsets: jax.Array | None = None,
) -> Matrix:
    """A matrix of weights that meet 16-bit activations.

    Args:
        numbers: uint8[N, K], unsigned: 0 .. 2^bits - 1.
        scales: float[N, G], in the checkpoint's dtype.
        zero_points: uint8[N, G], or None for 2^(bits - 1) everywhere.
        bits: of one number, 2 .. 8.
        group_size: inputs that share a scale, the last of them maybe fewer; -1 = all.
        dtype: of a dense result.
        group_of: int[K], the group of each input where they do not lie side by side (activation order).
        offsets: float[N, G], added to the values.

    Returns:
        Packed; dense `[K, N]` where groups cannot be those of the kernels.

    Raises:
        WeightsError: `group_of` names groups that there are not.
    """
    k = numbers.shape[-1]
    half = 1 << (bits - 1)
    if zero_points is not None and bool((zero_points == half).all()):
        zero_points = None
    size = k if group_size < 0 else min(group_size, k)
    if group_of is not None and np.array_equal(group_of, np.arange(k) // size):
        group_of = None
    order = None if group_of is None else _order(group_of, scales.shape[1], size)
    fits = None if group_of is not None and order is None else groups_that_fit(group_size, k)
    signed = numbers.astype(jnp.int16) - half
    zeros = None if zero_points is None else zero_points.astype(jnp.int16) - half
    if fits is None:
        logger.info("groups of %d among %d inputs are not those of any kernel: dequantized at load", size, k)
        groups = np.arange(k) // size if group_of is None else group_of
        return _dense(signed, scales, zeros, offsets, groups, dtype)
    if order is not None:
        signed = signed[:, order]
    cut = None if fits < 0 else np.arange(k // fits) * fits // size  # group of each of the kernel's groups

    def regroup(rows: jax.Array | None) -> jax.Array | None:
        return rows if rows is None or cut is None else rows[:, cut]

    weight = repack(
        signed,
        regroup(scales),  # type: ignore[arg-type]
        regroup(zeros),
        kind=kind_of(bits),
        group_size=fits,
        offsets=regroup(offsets),
    )
    return weight if order is None else replace(weight, input_order=jnp.asarray(order, jnp.int32))


def _order(group_of: np.ndarray, num_groups: int, group_size: int) -> np.ndarray | None:
    """The order that puts groups side by side; None if they are not all of the size."""
    if group_of.min(initial=0) < 0 or group_of.max(initial=0) >= num_groups:
        raise WeightsError(f"its inputs are of groups {group_of.min()} to {group_of.max()}, and it has {num_groups}.")
    order = np.argsort(group_of, kind="stable")
    side_by_side = np.arange(len(group_of)) // group_size
    return order if np.array_equal(group_of[order], side_by_side) else None


def _dense(
    numbers: jax.Array,
    scales: jax.Array,
    zero_points: jax.Array | None,
    offsets: jax.Array | None,
    groups: np.ndarray,
    dtype: np.dtype,
) -> jax.Array:
    """`[K, N]`, computed in float32."""
    wide = numbers.astype(jnp.float32)
    if zero_points is not None:
        wide = wide - zero_points[:, groups]
    wide = wide * scales[:, groups].astype(jnp.float32)
    if offsets is not None:
        wide = wide + offsets[:, groups].astype(jnp.float32)
    return wide.T.astype(dtype)
