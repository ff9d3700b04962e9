"""Which tiny models exist, what each is there to catch, and the wrong readings it must tell apart.

Every model has vocabulary 320, hidden size 64, 4 heads of 16, 2 KV heads and 3 layers unless its spec says otherwise.
`rms_norm_eps` is far larger than in real models and the RoPE base far smaller, so that a wrong value shows within 100
positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB_SIZE = 320
ENDOFTEXT_ID, IM_START_ID, IM_END_ID = 0, 1, 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
    "bos_token_id": IM_START_ID,
    "eos_token_id": IM_END_ID,
    "pad_token_id": ENDOFTEXT_ID,
}


@dataclass(frozen=True)
class WrongReading:
    """One way to read the checkpoint wrongly: other config values, or weights replaced by a constant."""

    config: Mapping[str, Any] = field(default_factory=dict)
    fill: Mapping[str, float] = field(default_factory=dict)  # end of a parameter name -> value


@dataclass(frozen=True)
class TinySpec:
    """One tiny model."""

    name: str
    model_type: str
    covers: str
    config: Mapping[str, Any]
    wrong: Mapping[str, WrongReading]
    on_grid: bool = True  # weights are multiples of 1/64: exact in bfloat16 and float16, and they compress well
    old_dialect: bool = False  # config.json is rewritten in the dialect of transformers 4


def _rope(theta: float, rope_type: str = "default", **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": rope_type, **scaling}}


def _spec(
    name: str,
    model_type: str,
    covers: str,
    *,
    rope: Mapping[str, Any],
    wrong: Mapping[str, WrongReading],
    on_grid: bool = True,
    old_dialect: bool = False,
    **config: Any,
) -> TinySpec:
    """A spec on top of the common shape; every model must also notice a wrong theta, epsilon and norm weight."""
    theta = rope["rope_parameters"]["rope_theta"]
    always = {
        "theta_doubled": WrongReading({"rope_parameters": rope["rope_parameters"] | {"rope_theta": 2 * theta}}),
        "eps_1e-6": WrongReading({"rms_norm_eps": 1e-6}),
        "norms_all_one": WrongReading(fill={"norm.weight": 1.0}),
    }
    return TinySpec(name, model_type, covers, _COMMON | dict(rope) | config, always | dict(wrong), on_grid, old_dialect)


_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 32}
_MSCALE: dict[str, Any] = {"mscale": 2.0, "mscale_all_dim": 0.5, "beta_fast": 2.0, "beta_slow": 0.25}

_LLAMA_SPECS = (
    _spec(
        "llama",
        "llama",
        "plain llama, untied head, full float32 weights; has the tokenizer",
        rope=_rope(2000.0),
        wrong={},
        on_grid=False,
        tie_word_embeddings=False,
    ),
    _spec("llama_tied", "llama", "tied head", rope=_rope(2000.0), wrong={}, tie_word_embeddings=True),
    _spec(
        "llama3_rope",
        "llama",
        "rope_type llama3: kept, blended and divided frequencies; two end-of-sequence ids",
        rope=_rope(500.0, "llama3", **_LLAMA3),
        wrong={
            "unscaled": WrongReading(_rope(500.0)),
            "linear": WrongReading(_rope(500.0, "linear", factor=8.0)),
            "original_max_128": WrongReading(
                _rope(500.0, "llama3", **_LLAMA3 | {"original_max_position_embeddings": 128})
            ),
        },
        tie_word_embeddings=True,
        eos_token_id=[IM_END_ID, ENDOFTEXT_ID],
    ),
    _spec(
        "llama_linear_rope",
        "llama",
        "rope_type linear",
        rope=_rope(500.0, "linear", factor=3.0),
        wrong={"unscaled": WrongReading(_rope(500.0))},
        tie_word_embeddings=True,
    ),
    _spec(
        "llama_yarn",
        "llama",
        "rope_type yarn with its defaults; cos and sin carry the attention factor 0.1 ln(factor) + 1",
        rope=_rope(500.0, "yarn", **_YARN),
        wrong={
            "unscaled": WrongReading(_rope(500.0)),
            "attention_factor_1": WrongReading(_rope(500.0, "yarn", **_YARN, attention_factor=1.0)),
            "correction_range_not_truncated": WrongReading(_rope(500.0, "yarn", **_YARN, truncate=False)),
        },
        tie_word_embeddings=True,
        max_position_embeddings=128,
    ),
    _spec(
        "llama_yarn_mscale",
        "llama",
        "rope_type yarn with mscale, mscale_all_dim and betas; factor differs from max / original max positions",
        rope=_rope(500.0, "yarn", **_YARN, **_MSCALE),
        wrong={
            "mscale_ignored": WrongReading(_rope(500.0, "yarn", **_YARN, beta_fast=2.0, beta_slow=0.25)),
            "betas_ignored": WrongReading(_rope(500.0, "yarn", **_YARN, mscale=2.0, mscale_all_dim=0.5)),
            "factor_from_max_positions": WrongReading(_rope(500.0, "yarn", **_YARN | {"factor": 16.0}, **_MSCALE)),
        },
        tie_word_embeddings=True,
    ),
    _spec(
        "llama_bias",
        "llama",
        "attention_bias (q, k, v and o) and mlp_bias",
        rope=_rope(2000.0),
        wrong={
            f"no_{part}_bias": WrongReading(fill={f"{part}_proj.bias": 0.0})
            for part in ("q", "k", "v", "o", "gate", "up", "down")
        },
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    _spec(
        "llama_mha",
        "llama",
        "as many KV heads as heads; head_dim 24 is not hidden_size / heads",
        rope=_rope(2000.0),
        wrong={},
        tie_word_embeddings=True,
        num_key_value_heads=4,
        head_dim=24,
    ),
    _spec(
        "llama_old_config",
        "llama",
        "config.json of transformers 4: rope_theta, rope_scaling with 'type', torch_dtype, no head_dim",
        rope=_rope(500.0, "linear", factor=2.0),
        wrong={"rope_scaling_ignored": WrongReading(_rope(500.0)), "rope_theta_ignored": WrongReading(_rope(10000.0))},
        old_dialect=True,
        tie_word_embeddings=True,
    ),
)

_OTHER_SPECS = (
    _spec(
        "mistral",
        "mistral",
        "every layer slides: a query sees 24 tokens, itself included",
        rope=_rope(1000.0),
        wrong={
            "window_23": WrongReading({"sliding_window": 23}),
            "window_25": WrongReading({"sliding_window": 25}),
            "no_window": WrongReading({"sliding_window": None}),
        },
        tie_word_embeddings=False,
        sliding_window=24,
    ),
    _spec(
        "qwen2",
        "qwen2",
        "q, k and v biases without a flag in the config; tied head; no head_dim in the config",
        rope=_rope(1000.0),
        wrong={f"no_{part}_bias": WrongReading(fill={f"{part}_proj.bias": 0.0}) for part in ("q", "k", "v")},
        tie_word_embeddings=True,
    ),
    _spec(
        "qwen2_window",
        "qwen2",
        "layers 0 and 1 see everything, layers 2 and 3 see 16 tokens",
        rope=_rope(1000.0),
        wrong={
            "window_15": WrongReading({"sliding_window": 15}),
            "window_17": WrongReading({"sliding_window": 17}),
            "no_window": WrongReading({"use_sliding_window": False, "layer_types": None}),
            "all_layers_slide": WrongReading({"layer_types": ["sliding_attention"] * 4}),
            "first_layers_slide": WrongReading({"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2}),
        },
        tie_word_embeddings=True,
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=2,
    ),
    _spec(
        "qwen3",
        "qwen3",
        "q and k norms over each head before RoPE; head_dim 32 is not hidden_size / heads; no biases",
        rope=_rope(1000.0),
        wrong={
            "q_norm_weight_ignored": WrongReading(fill={"q_norm.weight": 1.0}),
            "k_norm_weight_ignored": WrongReading(fill={"k_norm.weight": 1.0}),
        },
        tie_word_embeddings=False,
        head_dim=32,
        rms_norm_eps=1e-2,
    ),
    _spec(
        "smollm3",
        "smollm3",
        "layer 3 has no RoPE (no_rope_layers is 1 where RoPE is used); tied head",
        rope=_rope(1000.0),
        wrong={
            "rope_everywhere": WrongReading({"no_rope_layers": [1, 1, 1, 1]}),
            "list_read_the_other_way": WrongReading({"no_rope_layers": [0, 0, 0, 1]}),
            "first_layer_without_rope": WrongReading({"no_rope_layers": [0, 1, 1, 1]}),
        },
        tie_word_embeddings=True,
        num_hidden_layers=4,
        no_rope_layer_interval=4,
    ),
)

SPECS: tuple[TinySpec, ...] = _LLAMA_SPECS + _OTHER_SPECS
