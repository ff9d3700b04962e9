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
from engine.runtime.limits import RuntimeLimits
from models.config import ModelConfig
from models.decoder import Decoder
from models.drafters.eagle import EagleHead
from models.drafters.load import load_eagle, load_medusa
from models.drafters.medusa import MedusaHeads
from models.functional import FunctionalModel, Params
from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.paged_attention import AttentionProblem


@dataclass(frozen=True)
class Target:
    """The model that heads are for. Attributes: config, params, limits, kernels: as everywhere."""

    config: ModelConfig
    params: Params
    limits: RuntimeLimits
    kernels: KernelConfig

    def problem(self, of: ModelConfig) -> AttentionProblem:
        """Attention of a decoder beside the model, over pages of the same kind."""
        limits = self.limits
        return AttentionProblem(
            num_heads=of.num_heads,
            num_kv_heads=of.num_kv_heads,
            head_dim=of.head_dim,
            page_size=limits.block_size,
            dtype=limits.dtype,
            kv_dtype=limits.kv_dtype,
            implementation=self.kernels.attention_implementation,
        )


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
    if method == "medusa":
        return _medusa(path, num_drafts, target)
    config, limits = target.config, target.limits
    options = {"dtype": limits.dtype, "matmul": target.kernels.matmul_implementation}
    loaded = load_eagle(path, method, config, target.params, jnp.dtype(limits.dtype))
    decoder = loaded.config.decoder
    parts = EagleParts(
        head=FunctionalModel(partial(EagleHead, loaded.config, target.problem(decoder), **options)),
        params=loaded.params,
        ends=FunctionalModel(partial(Decoder, replace(config, layers=()), target.problem(config), **options)),
        end_params=keep_layers(target.params, ()),
        layout=KVLayout(1, decoder.num_kv_heads, limits.block_size, decoder.head_dim, limits.kv_dtype),
        taps=loaded.config.taps,
        num_layers=decoder.num_layers,
        size=decoder.hidden_size,
    )
    return EagleDrafter(parts, num_drafts, limits.dtype)


def _medusa(path: Path, num_drafts: int, target: Target) -> MedusaDrafter:
    dtype = target.limits.dtype
    loaded = load_medusa(path, target.config, jnp.dtype(dtype))
    if num_drafts > loaded.config.num_heads:
        raise ConfigError(
            f"speculative_config: num_speculative_tokens is {num_drafts}, and {path} has {loaded.config.num_heads} "
            "Medusa heads, of which each makes one guess."
        )
    matmul = target.kernels.matmul_implementation
    heads = FunctionalModel(partial(MedusaHeads, loaded.config, dtype=dtype, matmul=matmul))
    return MedusaDrafter(heads, loaded.params, num_drafts, target.config.hidden_size, dtype)
