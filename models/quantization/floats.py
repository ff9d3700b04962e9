"""Small floats with scales, as checkpoints hold them, become a matrix on the device.

    e4m3    8 bits, up to 448, no infinity; one byte a number
    e2m1    4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; two numbers a byte, the lower nibble first
    e8m0    a scale of 8 bits without a sign: 2^(byte - 127), 255 is no number

Sources: Micikevicius et al. 2022 (arXiv 2209.05433) for e4m3; OCP Microscaling Formats (MX) 1.0 for e2m1 and e8m0.
"""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from models.errors import WeightsError
from models.layers.product import Matrix
from models.quantization.integers import groups_that_fit
from pallas_kernels.quantized_matmul import repack

logger = logging.getLogger(__name__)

E4M3 = "float8_e4m3fn"
E8M0 = "float8_e8m0fnu"
SCALES = ("float32", "bfloat16", "float16", E8M0)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_E8M0_BIAS, _E8M0_NAN = 127, 255
_CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "output_scale")


def is_cache_scale(name: str) -> bool:
    """Whether a tensor is a scale of a KV cache in 8 bits, or of another intermediate result of attention."""
    return ".self_attn." in name and name.rpartition(".")[2] in _CACHE_SCALES


def from_e2m1(packed: np.ndarray) -> np.ndarray:
    """float32[..., 2 * bytes] of uint8[..., bytes]."""
    numbers = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.float32)
    numbers[..., 0::2], numbers[..., 1::2] = _E2M1[packed & 15], _E2M1[packed >> 4]
    return numbers


def from_e8m0(scales: np.ndarray) -> np.ndarray:
    """float32 of uint8 or float8_e8m0fnu.

    Raises:
        WeightsError: one of them is no number.
    """
    exponents = scales.view(np.uint8)
    if (exponents == _E8M0_NAN).any():
        raise WeightsError("its scales hold bytes of 255, which stand for no number.")
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - _E8M0_BIAS)


def usable_scales(scales: np.ndarray) -> np.ndarray:
    """Scales in a dtype that the device has: what is not float32, bfloat16 or float16 becomes float32, exactly.

    Raises:
        WeightsError: one of them is not finite.
    """
    if scales.dtype == ml_dtypes.float8_e8m0fnu:
        return from_e8m0(scales)
    if scales.dtype == ml_dtypes.float8_e4m3fn:
        scales = scales.astype(np.float32)
    if not np.isfinite(scales.astype(np.float32)).all():
        raise WeightsError("its scales hold numbers that are not finite.")
    return scales


def pack_e4m3(
    numbers: np.ndarray,
    scales: np.ndarray,
    *,
    kind: str,
    dtype: np.dtype,
    group_size: int = -1,
    rows_per_scale: int = 1,
) -> Matrix:
    """A matrix of 8-bit floats.

    Args:
        numbers: float8_e4m3fn[N, K].
        scales: [ceil(N / rows_per_scale), ceil(K / group_size)], or what broadcasts to it; one of `SCALES`.
        kind: "w8a8_fp8" or "w8a16_fp8".
        dtype: of a dense result.
        group_size: inputs that share a scale, the last of them maybe fewer; -1 = all.
        rows_per_scale: outputs that share one, the last of them maybe fewer.

    Returns:
        Packed; dense `[K, N]` where groups cannot be those of the kernels. Groups that do not divide K are cut into
        smaller ones with the same scale, which activations that are quantized in groups follow.

    Raises:
        WeightsError: a number or a scale is not finite.
    """
    if ((numbers.view(np.uint8) & 0x7F) == 0x7F).any():
        raise WeightsError("it holds numbers that are NaN.")
    usable, (n, k) = jnp.asarray(usable_scales(scales)), numbers.shape
    size = k if group_size < 0 else min(group_size, k)
    usable = jnp.broadcast_to(usable, (-(-n // rows_per_scale), -(-k // size)))
    fits = groups_that_fit(group_size, k)
    if fits is None:
        logger.info("groups of %d among %d inputs are not those of any kernel: dequantized at load", size, k)
        repeated = jnp.repeat(usable, rows_per_scale, axis=0)[:n]
        return scaled_dense(jnp.asarray(numbers).astype(jnp.float32), repeated, size, dtype)
    if fits > 0:
        usable = usable[:, np.arange(k // fits) * fits // size]
    return repack(jnp.asarray(numbers), usable, kind=kind, group_size=fits, rows_per_scale=rows_per_scale)


def scaled_dense(numbers: jax.Array, scales: jax.Array, group_size: int, dtype: np.dtype) -> jax.Array:
    """Dense `[K, N]` of float32[N, K] and float[N, ceil(K / group_size)], computed in float32."""
    groups = np.arange(numbers.shape[-1]) // group_size
    return (numbers * scales.astype(jnp.float32)[:, groups]).T.astype(dtype)
