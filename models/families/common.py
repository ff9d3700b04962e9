"""What every decoder's `config.json` says, and the `Family` record. A family replaces what differs in the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.config import LayerConfig, ModelConfig
from models.errors import UnsupportedModelError
from models.families.fields import (
    RawConfig,
    flag,
    integer,
    integers,
    number,
    optional_integer,
    refuse,
    strings,
    text,
)
from models.families.rope import parse_rope
from models.families.tensors import Assembly

DTYPES = ("float32", "bfloat16", "float16")
# gelu_new and gelu_fast are the same formula as gelu_pytorch_tanh, written by others.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


@dataclass(frozen=True)
class Family:
    """One recipe.

    Attributes:
        name: Hugging Face's `model_type`.
        architectures: entries of a config's `architectures` that this family serves.
        gguf_architectures: values of a GGUF file's `general.architecture` that this family serves.
        translate: (`config.json`, `generation_config.json` or {}) → ModelConfig; raises UnsupportedModelError.
        assemblies: from which checkpoint tensors each parameter of `models.parameters.parameter_shapes` is made.
    """

    name: str
    architectures: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    translate: Callable[[RawConfig, RawConfig], ModelConfig]
    assemblies: Callable[[ModelConfig], Mapping[str, Assembly]]


@dataclass(frozen=True)
class Defaults:
    """What the family's transformers class assumes for absent fields; `head_dim` None = hidden_size / heads."""

    rope_theta: float = 10000.0
    head_dim: int | None = None
    tie_word_embeddings: bool = False


def common_config(raw: RawConfig, generation: RawConfig, family: str, defaults: Defaults) -> ModelConfig:
    """The fields that all families read alike; every layer attends to everything with RoPE, nothing has a bias.

    Raises:
        UnsupportedModelError: a field is missing, out of range, or asks for something that is not supported.
    """
    hidden, heads = integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
    kv_heads = integer(raw, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    head_dim = optional_integer(raw, "head_dim") or defaults.head_dim
    if head_dim is None:
        if hidden % heads:
            refuse("hidden_size", hidden, f"a multiple of num_attention_heads ({heads}) where there is no head_dim")
        head_dim = hidden // heads
    max_position = integer(raw, "max_position_embeddings")
    return ModelConfig(
        family=family,
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(raw, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position,
        rms_norm_eps=number(raw, "rms_norm_eps", default=1e-6),
        rope=parse_rope(raw, head_dim=head_dim, max_position=max_position, default_theta=defaults.rope_theta),
        layers=(LayerConfig(),) * integer(raw, "num_hidden_layers"),
        dtype=_dtype(raw),
        activation=_activation(raw),
        tie_word_embeddings=flag(raw, "tie_word_embeddings", defaults.tie_word_embeddings),
        bos_token_id=_first(integers(generation, "bos_token_id") or integers(raw, "bos_token_id")),
        eos_token_ids=integers(generation, "eos_token_id") or integers(raw, "eos_token_id") or (),
    )


def layer_windows(raw: RawConfig, default: tuple[int | None, ...], window: int | None) -> tuple[int | None, ...]:
    """The attention window of each layer: what `layer_types` says, or `default` where it is absent.

    Args:
        raw: the whole `config.json`.
        default: one entry per layer.
        window: tokens that a layer of type "sliding_attention" sees; None if the config switches windows off.

    Raises:
        UnsupportedModelError: another layer type, too few of them, or a sliding layer where windows are switched off.
    """
    types = strings(raw, "layer_types")
    if types is None:
        return default
    if len(types) != len(default):
        refuse("layer_types", list(types), f"a list of {len(default)}, one per layer")
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        refuse("layer_types", unknown[0], "full_attention or sliding_attention for each layer")
    if "sliding_attention" in types and window is None:
        raise UnsupportedModelError(
            "config.json: layer_types has sliding_attention, but there is no sliding window in use."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _dtype(raw: RawConfig) -> str:
    """`dtype` since transformers 5, `torch_dtype` before; float32 where neither is, as in transformers."""
    name = text(raw, "dtype", text(raw, "torch_dtype", "float32")).removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModelError(f"config.json: dtype {name!r} is not supported; supported are {', '.join(DTYPES)}.")
    return name


def _activation(raw: RawConfig) -> str:
    name = text(raw, "hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"Activation {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _first(ids: tuple[int, ...] | None) -> int | None:
    return ids[0] if ids else None
