"""GGUF metadata → the config dict that the same model's `config.json` would hold.

llama.cpp keeps hyperparameters under its own names, leaves some out (they are literals in its source) and hides one
in a tensor:
Llama 3's frequency scaling is stored as the factors it makes, `rope_freqs.weight`. This page undoes all of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from models.errors import UnsupportedModelError, WeightsError
from models.loading.gguf_file import GgufFile

_ROPE_FACTORS = "rope_freqs.weight"

# Keys that change what the model computes and that no supported family has; refused unless the value changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.scale": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.temperature_scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.alpha": (0.0,),
    "rope.dimension_sections": ([], [0, 0, 0, 0]),
    "use_parallel_residual": (False,),
}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's converter treats one `general.architecture`.

    Attributes:
        hf_class: the entry of `architectures` in config.json.
        model_type: the `model_type` of config.json.
        permuted: rows of q and k are reordered within each head, for rope on neighbouring pairs (`LlamaModel.permute`).
    """

    hf_class: str
    model_type: str
    permuted: bool


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "llama", permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", permuted=False),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", permuted=False),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", permuted=True),
}


def architecture_of(file: GgufFile) -> Architecture:
    """The file's architecture.

    Raises:
        UnsupportedModelError: it is none of `ARCHITECTURES`.
    """
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(f"{file.path.name} has architecture {name!r}; supported in GGUF files: {known}.")
    return ARCHITECTURES[name]


class _Keys:
    """The metadata of one architecture: `keys["block_count"]` reads `llama.block_count`."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._prefix = file.metadata["general.architecture"]

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default`. A list of equal values (one per layer) counts as that value."""
        value = self._file.metadata.get(f"{self._prefix}.{name}", default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]
        return value

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise WeightsError(f"{self._file.path.name} is corrupt: metadata key '{self._prefix}.{name}' is missing.")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A count that is the same in all layers."""
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, int) or value <= 0:
            full = f"{self._prefix}.{name}"
            raise UnsupportedModelError(f"{self._file.path.name}: {full} must be one positive number, found {value!r}.")
        return value


def _number(value: float) -> float:
    """The shortest decimal that is the same float32: 9.99999974e-06 in the file was 1e-05 in config.json."""
    return float(str(np.float32(value)))


def _check_supported(file: GgufFile, keys: _Keys) -> None:
    for name, neutral in _NEUTRAL.items():
        value = keys.get(name)
        if value is not None and value not in neutral:
            arch = file.metadata["general.architecture"]
            raise UnsupportedModelError(
                f"{file.path.name}: {arch}.{name} = {value!r} is not supported for this architecture."
            )


def _llama3_factors(theta: float, dim: int, scaling: dict[str, float]) -> np.ndarray:
    """float64[dim / 2]: what Llama 3's scaling divides each frequency by (`_compute_llama3_parameters`)."""
    frequencies = theta ** -(np.arange(0, dim, 2) / dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)


def _fit_llama3(file: GgufFile, theta: float, dim: int, factors: np.ndarray) -> dict[str, Any]:
    """The parameters of Llama 3's scaling that make these factors.

    Between both ends, `1 / factor` is linear in the frequency, so that two points give slope and offset. Only the
    ratios to the original length are determined, hence `low_freq_factor` is taken as 1, as in every released model. The
    usual values are tried first, since tiny heads have too few points in between.
    """
    largest = _number(float(factors.max()))
    candidates = [(1.0, 4.0, float(length)) for length in (8192, 4096, 2048, 16384, 32768, 1024, 512, 256, 128, 64)]
    frequencies = theta ** -(np.arange(0, dim, 2) / dim)
    between = np.flatnonzero((factors > 1.0 + 1e-6) & (factors < largest * (1 - 1e-6)))
    if len(between) >= 2:
        smooth = (1.0 / factors[between] - 1.0 / largest) / (1.0 - 1.0 / largest)
        slope, offset = np.polyfit(frequencies[between] / (2 * math.pi), smooth, 1)
        # smooth = (length * frequency / 2π - low) / (high - low), with low = 1
        span = -1.0 / offset
        candidates.append((1.0, 1.0 + span, slope * span))
    for low, high, length in candidates:
        length = float(round(length))
        scaling = {
            "factor": largest,
            "low_freq_factor": low,
            "high_freq_factor": _number(round(high, 4)),
            "original_max_position_embeddings": length,
        }
        if length > 0 and high > low and np.allclose(_llama3_factors(theta, dim, scaling), factors, rtol=1e-5):
            return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": int(length)}
    raise UnsupportedModelError(
        f"{file.path.name}: the frequency factors in {_ROPE_FACTORS!r} are not those of Llama 3's scaling."
    )


def _yarn(keys: _Keys, factor: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
    }
    for name in ("beta_fast", "beta_slow"):
        value = keys.get(f"rope.scaling.yarn_{name}")
        if value is not None:
            scaling[name] = _number(value)
    absolute, relative = keys.get("rope.scaling.yarn_attn_factor"), keys.get("rope.scaling.attn_factor", 1.0)
    if absolute is not None:
        scaling["attention_factor"] = _number(absolute)
    elif relative != 1.0:
        # llama.cpp multiplies this with YaRN's own 0.1 ln(factor) + 1; transformers wants the product.
        scaling["attention_factor"] = relative * (0.1 * math.log(factor) + 1.0)
    return scaling


def _rope_parameters(file: GgufFile, keys: _Keys, head_dim: int) -> dict[str, Any]:
    theta = _number(keys.get("rope.freq_base", 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotary_dim = keys.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        rope["partial_rotary_factor"] = rotary_dim / head_dim
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))
    kind = keys.get("rope.scaling.type", "linear" if factor else "none")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"{file.path.name}: rope scaling {kind!r} is not supported; supported: none, linear, yarn, llama3."
        )
    if kind == "yarn":
        rope |= _yarn(keys, _number(factor))
    elif kind == "linear" and factor not in (0.0, 1.0):
        rope |= {"rope_type": "linear", "factor": _number(factor)}
    tensor = file.tensors.get(_ROPE_FACTORS)
    if tensor is not None:
        if tensor.kind is not GGMLQuantizationType.F32:
            raise WeightsError(
                f"Tensor {_ROPE_FACTORS!r} of {file.path.name} is stored as {tensor.kind.name}, expected F32."
            )
        factors = tensor.values().reshape(-1).astype(np.float64)
        if factors.shape != (rotary_dim // 2,):
            raise WeightsError(
                f"Tensor {_ROPE_FACTORS!r} of {file.path.name} has {factors.size} values, expected {rotary_dim // 2}."
            )
        if np.any(factors != 1.0):
            if rope["rope_type"] != "default":
                raise UnsupportedModelError(
                    f"{file.path.name} has both rope scaling {kind!r} and the tensor {_ROPE_FACTORS!r}."
                )
            rope |= _fit_llama3(file, theta, rotary_dim, factors)
    return rope


def _dtype(file: GgufFile) -> str:
    """The precision of the matrices: their own if all are stored as float16 or bfloat16, else float32."""
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) == 2}
    own = {GGMLQuantizationType.F16: "float16", GGMLQuantizationType.BF16: "bfloat16"}
    return own.get(next(iter(kinds)), "float32") if len(kinds) == 1 else "float32"


def _token_ids(file: GgufFile) -> dict[str, Any]:
    def ids(*names: str) -> list[int]:
        found = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
        return list(dict.fromkeys(value for value in found if value is not None))

    # Chat models may end a turn (eot) or a message to a tool (eom) with tokens of their own.
    ends, bos, padding = ids("eos", "eot", "eom"), ids("bos"), ids("padding")
    return {
        "bos_token_id": bos[0] if bos else None,
        "eos_token_id": ends if len(ends) > 1 else (ends[0] if ends else None),
        "pad_token_id": padding[0] if padding else None,
    }


def _family_fields(file: GgufFile, keys: _Keys, num_layers: int) -> dict[str, Any]:
    """What only some families have."""
    architecture, window = architecture_of(file), keys.get("attention.sliding_window", 0)
    if architecture.model_type == "llama":
        if window:  # only Mistral's models, which share llama.cpp's "llama", have one
            return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
        return {}
    if window:
        raise UnsupportedModelError(
            f"{file.path.name}: a sliding window of {window} is not supported for {architecture.model_type}: "
            "the file does not say which layers have it."
        )
    if architecture.model_type == "smollm3":
        # A literal in llama.cpp (src/models/smollm3.cpp), no key: every fourth layer has no rope.
        layers = [int((layer + 1) % 4 != 0) for layer in range(num_layers)]
        return {"no_rope_layer_interval": 4, "no_rope_layers": layers, "use_sliding_window": False}
    return {"use_sliding_window": False}


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """The config of a GGUF file, in the dialect of Hugging Face's `config.json` (transformers 5).

    Raises:
        UnsupportedModelError: the architecture, or a key that changes what it computes, is not supported.
        WeightsError: a key that every such model has is missing.
    """
    architecture, keys = architecture_of(file), _Keys(file)
    _check_supported(file, keys)
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{file.path.name}: heads of values and of keys differ in size.")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{file.path.name} has no matrix 'token_embd.weight'.")
    num_layers = keys.integer("block_count")
    return {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "dtype": _dtype(file),
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": _number(keys["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": _rope_parameters(file, keys, head_dim),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_token_ids(file),
        **_family_fields(file, keys, num_layers),
    }
