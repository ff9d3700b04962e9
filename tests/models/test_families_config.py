"""`config.json` → `ModelConfig`, with transformers' own config classes as the second opinion."""

import json
from typing import Any

import pytest
from transformers import AutoConfig

from models.config import LayerConfig, ModelConfig
from models.errors import UnsupportedModelError
from models.parameters import parameter_shapes
from models.registry import FAMILIES
from tests.models.tiny_checkpoints import GOLDEN, GOLDEN_NAMES, family_of, tiny_config

LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

# Config files as they are published (without the fields that no decoder reads), dialect of transformers 4.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3_ROPE,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": 128012,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(36)],
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
}
GOLDEN_CONFIGS = {name: json.loads((GOLDEN / name / "config.json").read_text()) for name in GOLDEN_NAMES}
# Absent fields take what the family's transformers class assumes.
BARE = {
    family.name: {
        "architectures": [family.architectures[0]],
        "model_type": family.name,
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 30,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_theta": 20000.0,
    }
    for family in FAMILIES
}
ALL_CONFIGS = PUBLISHED | GOLDEN_CONFIGS | {f"bare {name}": config for name, config in BARE.items()}


def translate(config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    return family_of(config).translate(config, generation or {})


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_agrees_with_transformers(name: str) -> None:
    raw = ALL_CONFIGS[name]
    config = translate(raw)
    theirs = AutoConfig.for_model(**json.loads(json.dumps(raw)))

    assert config.family == theirs.model_type
    assert config.vocab_size == theirs.vocab_size
    assert config.hidden_size == theirs.hidden_size
    assert config.intermediate_size == theirs.intermediate_size
    assert config.num_heads == theirs.num_attention_heads
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.num_layers == theirs.num_hidden_layers
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.rope.scaling == theirs.rope_parameters["rope_type"]
    assert config.rope.factor == theirs.rope_parameters.get("factor", 1.0)
    if config.rope.scaling in ("llama3", "yarn"):
        assert config.rope.original_max_position == theirs.rope_parameters["original_max_position_embeddings"]
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * config.num_layers
    window = getattr(theirs, "sliding_window", None)
    assert [layer.window for layer in config.layers] == [window if t == "sliding_attention" else None for t in types]
    uses_rope = getattr(theirs, "no_rope_layers", None) or [1] * config.num_layers
    assert [layer.use_rope for layer in config.layers] == [bool(value) for value in uses_rope]


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_assemblies_make_exactly_the_decoders_parameters(name: str) -> None:
    config = translate(ALL_CONFIGS[name])
    assemblies = family_of(ALL_CONFIGS[name]).assemblies(config)
    assert {target: assembly.shape for target, assembly in assemblies.items()} == parameter_shapes(config)


def test_llama_by_hand() -> None:
    config = translate(PUBLISHED["Llama-3.2-1B-Instruct"])
    assert (config.dtype, config.activation, config.head_dim) == ("bfloat16", "silu", 64)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.bos_token_id == 128000
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)
    assert config.layers == (LayerConfig(window=None, use_rope=True),) * 16
    assert parameter_shapes(config)["layers.15.attn.qkv.weight"] == (2048, 3072)
    assert "head.weight" not in parameter_shapes(config)


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("LlamaForCausalLM", {"attention_bias": True}, (True, True, False, False)),
        ("LlamaForCausalLM", {"mlp_bias": True}, (False, False, True, False)),
        ("MistralForCausalLM", {}, (False, False, False, False)),
        ("Qwen2ForCausalLM", {}, (True, False, False, False)),
        ("Qwen3ForCausalLM", {}, (False, False, False, True)),
        ("Qwen3ForCausalLM", {"attention_bias": True}, (True, True, False, True)),
        ("SmolLM3ForCausalLM", {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
    ],
)
def test_biases_and_norms(architecture: str, changes: dict, expected: tuple[bool, ...]) -> None:
    config = translate(tiny_config(architecture, **changes))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == expected


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_windows(architecture: str) -> None:
    def layers(**changes: Any) -> list[int | None]:
        return windows(translate(tiny_config(architecture, num_hidden_layers=4, sliding_window=16) | changes))

    types = ["sliding_attention", "full_attention"] * 2
    assert layers() == [None] * 4  # a number alone switches nothing on
    assert layers(use_sliding_window=True, max_window_layers=3) == [None, None, None, 16]
    assert layers(use_sliding_window=True, max_window_layers=0) == [16] * 4
    assert layers(use_sliding_window=True) == [None] * 4  # max_window_layers is 28 by default
    assert layers(use_sliding_window=True, layer_types=types) == [16, None] * 2
    assert layers(use_sliding_window=True, sliding_window=None, max_window_layers=0) == [None] * 4
    with pytest.raises(UnsupportedModelError, match="no sliding window in use"):
        layers(layer_types=types)


def test_mistral_windows() -> None:
    assert windows(translate(tiny_config("MistralForCausalLM", sliding_window=7))) == [7, 7]
    assert windows(translate(tiny_config("MistralForCausalLM", sliding_window=None))) == [None, None]
    without = tiny_config("MistralForCausalLM")
    del without["sliding_window"]
    assert windows(translate(without)) == [4096, 4096]
    mixed = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
    with pytest.raises(UnsupportedModelError, match="layer_types.*same for all layers"):
        translate(tiny_config("MistralForCausalLM", **mixed))


def test_smollm3_rope_and_windows() -> None:
    def layers(**changes: Any) -> list[tuple[int | None, bool]]:
        config = translate(tiny_config("SmolLM3ForCausalLM", num_hidden_layers=4) | changes)
        return [(layer.window, layer.use_rope) for layer in config.layers]

    assert layers() == [(None, True)] * 3 + [(None, False)]
    assert layers(no_rope_layer_interval=2) == [(None, True), (None, False)] * 2
    assert layers(no_rope_layers=[0, 1, 1, 1, 0]) == [(None, False)] + [(None, True)] * 3
    assert layers(use_sliding_window=True, sliding_window=8) == [(None, True)] * 3 + [(8, False)]
    assert layers(sliding_window=8) == [(None, True)] * 3 + [(None, False)]
    with pytest.raises(UnsupportedModelError, match="no_rope_layers.*at least 4 entries"):
        layers(no_rope_layers=[1, 1, 1])


def test_eos_ids_come_from_the_generation_config_first() -> None:
    raw = tiny_config(eos_token_id=2)
    assert translate(raw, {"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert translate(raw, {"eos_token_id": 7}).eos_token_ids == (7,)
    assert translate(raw, {"eos_token_id": None}).eos_token_ids == (2,)
    assert translate(raw, {}).eos_token_ids == (2,)
    assert translate(tiny_config(eos_token_id=None)).eos_token_ids == ()


def test_head_dim() -> None:
    derived = tiny_config("LlamaForCausalLM", head_dim=None)
    assert translate(derived).head_dim == 4
    assert translate(tiny_config("Qwen3ForCausalLM", head_dim=None)).head_dim == 128
    with pytest.raises(UnsupportedModelError, match="hidden_size is 14; it must be a multiple"):
        translate(derived | {"hidden_size": 14})


def test_dtype_in_both_dialects() -> None:
    assert translate(tiny_config(dtype="bfloat16")).dtype == "bfloat16"
    assert translate(tiny_config(dtype=None, torch_dtype="float16")).dtype == "float16"
    assert translate(tiny_config(dtype="torch.bfloat16")).dtype == "bfloat16"
    assert translate(tiny_config(dtype=None)).dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "Activation 'relu' is not supported; supported are silu"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads is 2; it must be a divisor of num_attention_heads \(3\)"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "40"}, "vocab_size is '40'; it must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be an integer of at least 1"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types.*one per layer"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "no sliding window in use"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        translate(tiny_config(**changes))


def test_activations() -> None:
    for name in ("gelu_pytorch_tanh", "gelu_new"):
        assert translate(tiny_config(hidden_act=name)).activation == "gelu_tanh"
    with pytest.raises(UnsupportedModelError, match="'gelu'"):  # the exact one is another function
        translate(tiny_config(hidden_act="gelu"))
