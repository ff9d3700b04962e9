"""Builds the drafter that `speculative_config` names, and refuses what does not fit the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.errors import ConfigError
from engine.runtime.drafting.drafter import DeviceDrafter
from engine.runtime.drafting.heads import Target, make_heads
from engine.runtime.drafting.layer_skip import LayerSkip
from engine.runtime.drafting.model import DraftModel
from engine.runtime.drafting.quantized import added_bytes, quantized_copy
from engine.runtime.executables import ModelProgram, structure_of
from engine.speculative.settings import HEADS, SpeculativeSettings
from models.functional import Params
from models.loading.load import LoadedModel


def make_drafter(
    settings: SpeculativeSettings | None, program: ModelProgram, params: Params, draft: LoadedModel | Path | None
) -> DeviceDrafter | None:
    """What makes guesses on the device; None if the method guesses on the host.

    Args:
        settings: of speculative decoding.
        program: of the model that is served.
        params: its weights.
        draft: the model that `settings.model` names; the directory of heads.

    Raises:
        ConfigError: layers that the model does not have, or a model of another vocabulary.
        QuireError: heads that do not fit the model, see `make_heads`.
    """
    if settings is None:
        return None
    if settings.method == "layer_skip":
        return _layer_skip(settings, program, params)
    if settings.method == "draft_model":
        assert isinstance(draft, LoadedModel), "loaded with the settings"
        return _draft_model(program, draft)
    if settings.method in HEADS:
        assert isinstance(draft, Path), "found with the settings"
        target = Target(program.config, params, program.limits, program.kernels)
        return make_heads(settings.method, draft, settings.num_speculative_tokens, target)
    return None


def _layer_skip(settings: SpeculativeSettings, program: ModelProgram, params: Params) -> LayerSkip:
    config, layers, weights = program.config, settings.layers, params
    if layers is None:
        kept = list(range(config.num_layers))
    else:
        kept = list(range(layers)) if isinstance(layers, int) else list(layers)
        whole = len(kept) == config.num_layers and settings.quantization is None
        if not kept or kept[-1] >= config.num_layers or whole:
            raise ConfigError(
                f"speculative_config: layers={settings.layers!r} must leave out at least one of the model's "
                f"{config.num_layers} layers, keep at least one, and name none beyond {config.num_layers - 1}."
            )
    if settings.quantization is not None:
        config, weights = quantized_copy(config, params, settings.quantization)
    short = replace(config, layers=tuple(config.layers[index] for index in kept))
    drafter = LayerSkip(structure_of(short, program.limits, program.kernels), weights, kept)
    drafter.extra_bytes = added_bytes(params, weights)
    return drafter


def _draft_model(program: ModelProgram, draft: LoadedModel) -> DraftModel:
    target, config = program.config, draft.config
    if config.vocab_size != target.vocab_size:
        raise ConfigError(
            f"speculative_config: the draft model has {config.vocab_size} tokens and the model {target.vocab_size}: "
            "a draft model must have the same vocabulary."
        )
    if config.max_position_embeddings < program.limits.max_model_len:
        raise ConfigError(
            f"speculative_config: the draft model was made for {config.max_position_embeddings} positions, fewer than "
            f"max_model_len={program.limits.max_model_len}. Set max_model_len to that or less."
        )
    own = ModelProgram.of(config, replace(program.limits, dtype=draft.dtype), 2, program.kernels)
    return DraftModel(own.model, draft.params, own.cache, config.num_layers)
