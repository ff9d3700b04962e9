"""Llama: the family that all others differ from. Serves Llama 1 to 3, SmolLM and SmolLM2, TinyLlama, Yi and their like.

Config class: transformers' `LlamaConfig`. `pretraining_tp` is not read: it splits the same sums, nothing else.
"""

from __future__ import annotations

from dataclasses import replace

from models.config import ModelConfig
from models.families.common import Defaults, Family, common_config, layer_windows
from models.families.fields import RawConfig, flag
from models.families.tensors import decoder_tensors


def _translate(raw: RawConfig, generation: RawConfig) -> ModelConfig:
    config = common_config(raw, generation, "llama", Defaults())
    layer_windows(raw, (None,) * config.num_layers, window=None)  # refuses sliding layers: this class has none
    attention_bias = flag(raw, "attention_bias", False)
    return replace(
        config,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=flag(raw, "mlp_bias", False),
    )


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    gguf_architectures=("llama",),  # a GGUF file of Mistral says "llama" too
    translate=_translate,
    assemblies=decoder_tensors,
)
