"""Mistral: Llama without biases, every layer with the same sliding window (or none).

Config class: transformers' `MistralConfig`, whose window is 4096 where the config does not mention it. Mistral 7B
v0.1 slides over 4096 tokens; later ones write `"sliding_window": null`.
"""

from __future__ import annotations

from dataclasses import replace

from models.config import LayerConfig, ModelConfig
from models.families.common import Defaults, Family, common_config, layer_windows
from models.families.fields import RawConfig, optional_integer, refuse
from models.families.tensors import decoder_tensors

_DEFAULT_WINDOW = 4096


def _translate(raw: RawConfig, generation: RawConfig) -> ModelConfig:
    config = common_config(raw, generation, "mistral", Defaults())
    window = optional_integer(raw, "sliding_window") if "sliding_window" in raw else _DEFAULT_WINDOW
    same_everywhere = (window,) * config.num_layers
    if layer_windows(raw, same_everywhere, window) != same_everywhere:
        refuse("layer_types", raw["layer_types"], "the same for all layers of a MistralForCausalLM")
    return replace(config, layers=(LayerConfig(window=window),) * config.num_layers)


MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    gguf_architectures=(),  # llama.cpp writes Mistral as "llama"
    translate=_translate,
    assemblies=decoder_tensors,
)
