"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) with the scalings that checkpoints use.

Head dims are rotated in halves (dim i with i + rotary_dim/2), as Hugging Face stores its weights.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from models.config import RopeConfig
from pallas_kernels.rowwise import turns


def frequencies(rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies float32[rotary_dim / 2] and the factor that multiplies cos and sin.

    Sources: linear: Chen et al. 2023 (arXiv 2306.15595); llama3: the Llama 3.1 reference code; yarn: Peng et al. 2023
        (arXiv 2309.00071).
    """
    base = 1.0 / rope.theta ** (np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim))
    base = base.astype(np.float32)
    if rope.scaling == "default":
        return base, 1.0
    if rope.scaling == "linear":
        return base / np.float32(rope.factor), 1.0
    if rope.scaling == "llama3":
        return _llama3(base, rope), 1.0
    if rope.scaling == "yarn":
        return _yarn(rope)
    raise ValueError(
        f"rope scaling {rope.scaling!r} reached the decoder; families accept default, linear, llama3 and yarn"
    )


def _llama3(base: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / base
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * base / rope.factor + smooth * base
    scaled = np.where(wavelength > rope.original_max_position / rope.low_freq_factor, base / rope.factor, blended)
    return np.where(wavelength < rope.original_max_position / rope.high_freq_factor, base, scaled).astype(np.float32)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(rope: RopeConfig) -> tuple[np.ndarray, float]:
    """NTK-by-parts: dims that turn more than `beta_fast` times in the original context are kept, those under
    `beta_slow` interpolated.
    """

    def dim_of(rotations: float) -> float:
        return (
            rope.rotary_dim
            * math.log(rope.original_max_position / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = (np.arange(rope.rotary_dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    keep = 1 - np.clip(ramp, 0, 1)
    positions = rope.theta ** (np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim))
    inverse = (1.0 / (rope.factor * positions)) * (1 - keep) + (1.0 / positions) * keep
    scale = rope.attention_factor
    if scale is None and rope.mscale and rope.mscale_all_dim:
        scale = _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    if scale is None:
        scale = _yarn_scale(rope.factor, 1.0)
    return inverse.astype(np.float32), scale


def cos_sin(rope: RopeConfig, positions: jax.Array, implementation: str = "auto") -> tuple[jax.Array, jax.Array]:
    """float32[T, rotary_dim] each, for int32[T] positions, as `rowwise.heads` takes them. Computed once per step,
    shared by all layers.
    """
    inverse, scale = frequencies(rope)
    angles = positions.astype(jnp.float32)[:, None] * inverse
    return turns(angles, scale, implementation)
