"""Qwen2 and Qwen2.5: Llama with biases on q, k and v (no flag says so), and windows on the last layers.

Config class: transformers' `Qwen2Config`. `sliding_window` is only a number until `use_sliding_window` switches it on.
"""

from __future__ import annotations

from dataclasses import replace

from models.config import LayerConfig, ModelConfig
from models.families.common import Defaults, Family, common_config, layer_windows
from models.families.fields import RawConfig, flag, integer, optional_integer
from models.families.tensors import decoder_tensors

_DEFAULT_WINDOW, _DEFAULT_MAX_WINDOW_LAYERS = 4096, 28


def qwen_layers(raw: RawConfig, num_layers: int) -> tuple[LayerConfig, ...]:
    """Windows of the layers, as Qwen2 and Qwen3 state them."""
    window = None
    if flag(raw, "use_sliding_window", False):
        window = optional_integer(raw, "sliding_window") if "sliding_window" in raw else _DEFAULT_WINDOW
    first = integer(raw, "max_window_layers", default=_DEFAULT_MAX_WINDOW_LAYERS, minimum=0)
    by_depth = tuple(window if index >= first else None for index in range(num_layers))
    return tuple(LayerConfig(window=window) for window in layer_windows(raw, by_depth, window))


def _translate(raw: RawConfig, generation: RawConfig) -> ModelConfig:
    config = common_config(raw, generation, "qwen2", Defaults())
    return replace(config, layers=qwen_layers(raw, config.num_layers), qkv_bias=True)


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    gguf_architectures=("qwen2",),
    translate=_translate,
    assemblies=decoder_tensors,
)
