"""Qwen3 (dense): Qwen2 with an RMSNorm over each head's q and k in place of the biases, and heads of 128 dims.

Config class: transformers' `Qwen3Config`, whose `head_dim` is 128 unless stated, whatever hidden_size / heads is.
"""

from __future__ import annotations

from dataclasses import replace

from models.config import ModelConfig
from models.families.common import Defaults, Family, common_config
from models.families.fields import RawConfig, flag
from models.families.qwen2 import qwen_layers
from models.families.tensors import decoder_tensors


def _translate(raw: RawConfig, generation: RawConfig) -> ModelConfig:
    config = common_config(raw, generation, "qwen3", Defaults(head_dim=128))
    attention_bias = flag(raw, "attention_bias", False)
    return replace(
        config,
        layers=qwen_layers(raw, config.num_layers),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
    )


QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    gguf_architectures=("qwen3",),
    translate=_translate,
    assemblies=decoder_tensors,
)
