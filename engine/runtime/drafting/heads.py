"""Heads from their files: what `method` "medusa", "eagle" or "eagle3" drafts with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp

from engine.config import KernelConfig
from engine.errors import ConfigError
from engine.runtime.drafting.drafter import DeviceDrafter
from engine.runtime.drafting.eagle import EagleDrafter, EagleParts
from engine.runtime.drafting.layer_skip import keep_layers
from engine.runtime.drafting.medusa import MedusaDrafter
from engine.runtime.drafting.recent import states_bytes
from engine.runtime.executables import attention_problem, structure_of
from engine.runtime.limits import RuntimeLimits
from models.config import ModelConfig
from models.drafters.eagle import EagleHead
from models.drafters.load import load_eagle, load_medusa
from models.drafters.medusa import MedusaHeads
from models.functional import FunctionalModel, Params
from pallas_kernels.kv_layout import KVLayout


@dataclass(frozen=True)
class Target:
    """The model that heads are for. Attributes: config, params, limits, kernels: as everywhere."""

    config: ModelConfig
    params: Params
    limits: RuntimeLimits
    kernels: KernelConfig


def make_heads(method: str, path: Path, num_drafts: int, target: Target) -> DeviceDrafter:
    """Load heads and make what drafts with them.

    Args:
        method: "medusa", "eagle" or "eagle3".
        path: directory of the heads.
        num_drafts: K.
        target: the model that they are for.

    Raises:
        ConfigError: more drafts than there are Medusa heads.
        QuireError: see `load_medusa`, `load_eagle`.
    """
    drafter, width = (
        _medusa(path, num_drafts, target) if method == "medusa" else _eagle(method, path, num_drafts, target)
    )
    drafter.extra_bytes += states_bytes(target.limits.max_num_seqs, num_drafts + 1, width, target.limits.dtype)
    return drafter


def _eagle(method: str, path: Path, num_drafts: int, target: Target) -> tuple[EagleDrafter, int]:
    """The drafter, and how wide the states are that it keeps."""
    config, limits, kernels = target.config, target.limits, target.kernels
    loaded = load_eagle(path, method, config, target.params, jnp.dtype(limits.dtype))
    decoder = loaded.config.decoder
    problem = attention_problem(decoder, limits, kernels)
    head = partial(EagleHead, loaded.config, problem, dtype=limits.dtype, matmul=kernels.matmul_implementation)
    parts = EagleParts(
        head=FunctionalModel(head),
        params=loaded.params,
        ends=structure_of(replace(config, layers=()), limits, kernels),
        end_params=keep_layers(target.params, ()),
        layout=KVLayout(1, decoder.num_kv_heads, limits.block_size, decoder.head_dim, limits.kv_dtype),
        taps=loaded.config.taps,
        num_layers=decoder.num_layers,
        size=decoder.hidden_size,
    )
    return EagleDrafter(parts, num_drafts, limits.dtype), decoder.hidden_size


def _medusa(path: Path, num_drafts: int, target: Target) -> tuple[MedusaDrafter, int]:
    """The drafter, and how wide the states are that it keeps."""
    dtype, size = target.limits.dtype, target.config.hidden_size
    loaded = load_medusa(path, target.config, jnp.dtype(dtype))
    if num_drafts > loaded.config.num_heads:
        raise ConfigError(
            f"speculative_config: num_speculative_tokens is {num_drafts}, and {path} has {loaded.config.num_heads} "
            "Medusa heads, of which each makes one guess."
        )
    matmul = target.kernels.matmul_implementation
    heads = FunctionalModel(partial(MedusaHeads, loaded.config, dtype=dtype, matmul=matmul))
    return MedusaDrafter(heads, loaded.params, num_drafts, size, dtype), size
