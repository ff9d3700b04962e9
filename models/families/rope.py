"""Rotary embeddings in both dialects of `config.json` → `RopeConfig`.

    transformers ≥ 5   "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, …}
    transformers ≤ 4   "rope_theta": 500000.0, "rope_scaling": null or {"type" (or "rope_type"): "llama3", …}

Whoever reads only the older one gets theta 10000 from every newer checkpoint, and a model that talks nonsense at
length. So a `rope_parameters` without theta is an error here, and the default applies only where neither dialect
states one. Fallbacks are those of transformers' `modeling_rope_utils.py` (`standardize_rope_params`,
`_compute_yarn_parameters`).
"""

from __future__ import annotations

import logging
from typing import Any

from models.config import RopeConfig
from models.errors import UnsupportedModelError
from models.families.fields import (
    RawConfig,
    flag,
    number,
    optional_integer,
    optional_number,
    refuse,
    table,
    text,
)

logger = logging.getLogger(__name__)

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_KNOWN_KEYS = {
    "rope_theta",
    "rope_type",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
}


def parse_rope(raw: RawConfig, *, head_dim: int, max_position: int, default_theta: float) -> RopeConfig:
    """Read a config's rotary embedding.

    Args:
        raw: the whole `config.json`.
        head_dim: D.
        max_position: `max_position_embeddings`, where a scaling does not say what it was before.
        default_theta: the family's base, where neither dialect states one.

    Raises:
        UnsupportedModelError: the kind is not one of `ROPE_TYPES`, the dialects contradict each other, or a parameter
            is missing or out of range.
    """
    scaling = _merged_dialects(raw)
    kind = text(scaling, "rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(f"RoPE type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}.")
    theta = _theta(raw, scaling, default_theta)
    rotary_dim = _rotary_dim(raw, scaling, head_dim)
    if kind == "default":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    if kind == "linear":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim, scaling=kind, factor=number(scaling, "factor"))
    # As in transformers, a value beside the rope parameters wins over the one inside them.
    original = (
        optional_integer(raw, "original_max_position_embeddings")
        or optional_integer(scaling, "original_max_position_embeddings")
        or max_position
    )
    if kind == "llama3":
        return _llama3(scaling, theta, rotary_dim, original)
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        scaling=kind,
        factor=optional_number(scaling, "factor") or max_position / original,
        beta_fast=_number_or(scaling, "beta_fast", 32.0),
        beta_slow=_number_or(scaling, "beta_slow", 1.0),
        original_max_position=original,
        attention_factor=optional_number(scaling, "attention_factor"),
        mscale=_number_or(scaling, "mscale", None),
        mscale_all_dim=_number_or(scaling, "mscale_all_dim", None),
        truncate=flag(scaling, "truncate", True),
    )


def _llama3(scaling: RawConfig, theta: float, rotary_dim: int, original: int) -> RopeConfig:
    low, high = number(scaling, "low_freq_factor"), number(scaling, "high_freq_factor")
    if high <= low:
        refuse("high_freq_factor", high, f"above low_freq_factor ({low:g})")
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        scaling="llama3",
        factor=number(scaling, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=original,
    )


def _number_or(raw: RawConfig, key: str, default: Any) -> Any:
    """A number above 0, or the default: transformers reads these as `raw.get(key) or default`, so 0 means absent."""
    return default if raw.get(key) == 0 else optional_number(raw, key) or default


def _merged_dialects(raw: RawConfig) -> dict[str, Any]:
    """The keys of `rope_parameters` and `rope_scaling` in one table, `type` renamed to `rope_type`."""
    merged: dict[str, Any] = {}
    for dialect in ("rope_parameters", "rope_scaling"):
        for key, value in _renamed(table(raw, dialect)).items():
            if isinstance(value, dict):
                raise UnsupportedModelError(
                    f"config.json: {dialect} has a table for {key!r}: RoPE that differs by layer type is not supported."
                )
            if merged.setdefault(key, value) != value:
                raise UnsupportedModelError(
                    f"config.json: rope_parameters and rope_scaling contradict each other: "
                    f"{key} is {merged[key]!r} and {value!r}."
                )
    unknown = sorted(set(merged) - _KNOWN_KEYS)
    if unknown and merged.get("rope_type", "default") in ROPE_TYPES:
        logger.warning("config.json: RoPE parameters without meaning here: %s", ", ".join(unknown))
    return merged


def _renamed(parameters: RawConfig) -> dict[str, Any]:
    kind = parameters.get("rope_type") or parameters.get("type")
    present = {
        key: value for key, value in parameters.items() if key not in ("type", "rope_type") and value is not None
    }
    return present if kind is None else present | {"rope_type": kind}


def _theta(raw: RawConfig, scaling: RawConfig, default: float) -> float:
    theta = optional_number(scaling, "rope_theta") or optional_number(raw, "rope_theta")
    if theta is not None:
        return theta
    if table(raw, "rope_parameters"):
        raise UnsupportedModelError("config.json: rope_parameters has no rope_theta, and there is none beside it.")
    logger.warning("config.json states no rope_theta: the family's default of %g applies", default)
    return default


def _rotary_dim(raw: RawConfig, scaling: RawConfig, head_dim: int) -> int:
    factor = optional_number(scaling, "partial_rotary_factor") or optional_number(raw, "partial_rotary_factor") or 1.0
    rotary_dim = int(head_dim * factor)
    if factor > 1 or rotary_dim < 2 or rotary_dim % 2:
        refuse("partial_rotary_factor", factor, f"at most 1 and give an even number of the {head_dim} dims of a head")
    return rotary_dim
