"""SmolLM3: Llama with every fourth layer without RoPE (NoPE), which may also be the only layers with a window.

Config class: transformers' `SmolLM3Config`. Despite its name, `no_rope_layers` is 1 where RoPE *is* used. The
embedding is tied and theta is 2,000,000 unless stated.
"""

from __future__ import annotations

from dataclasses import replace

from models.config import LayerConfig, ModelConfig
from models.families.common import Defaults, Family, common_config, layer_windows
from models.families.fields import RawConfig, flag, integer, integers, optional_integer, refuse
from models.families.tensors import decoder_tensors


def _uses_rope(raw: RawConfig, num_layers: int) -> tuple[bool, ...]:
    flags = integers(raw, "no_rope_layers")
    if flags is None:
        interval = integer(raw, "no_rope_layer_interval", default=4)
        return tuple((index + 1) % interval != 0 for index in range(num_layers))
    if len(flags) < num_layers or set(flags) - {0, 1}:
        refuse("no_rope_layers", list(flags), f"a list of at least {num_layers} entries, 1 = RoPE and 0 = none")
    return tuple(bool(value) for value in flags[:num_layers])


def _translate(raw: RawConfig, generation: RawConfig) -> ModelConfig:
    defaults = Defaults(rope_theta=2_000_000.0, tie_word_embeddings=True)
    config = common_config(raw, generation, "smollm3", defaults)
    uses_rope = _uses_rope(raw, config.num_layers)
    window = optional_integer(raw, "sliding_window") if flag(raw, "use_sliding_window", False) else None
    windows = layer_windows(raw, tuple(None if rope else window for rope in uses_rope), window)
    attention_bias = flag(raw, "attention_bias", False)
    return replace(
        config,
        layers=tuple(LayerConfig(*pair) for pair in zip(windows, uses_rope, strict=True)),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=flag(raw, "mlp_bias", False),
    )


SMOLLM3 = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    gguf_architectures=("smollm3",),
    translate=_translate,
    assemblies=decoder_tensors,
)
