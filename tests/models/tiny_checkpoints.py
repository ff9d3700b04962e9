"""Tiny checkpoints that the tests of families and loading write for themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from models.families.common import Family
from models.registry import resolve_family

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny"
GOLDEN_NAMES = sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").is_file())

NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tiny_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """A `config.json` with different sizes everywhere, so that no two axes can be confused."""
    config = {
        "architectures": [architecture],
        "dtype": "float32",
        "vocab_size": 40,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config | {"sliding_window": None} | changes


def family_of(config: dict[str, Any]) -> Family:
    """The family that serves a config."""
    return resolve_family(config["architectures"])


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor that the config's checkpoint must have, in its dtype."""
    family = family_of(config)
    rng = np.random.default_rng(seed)
    dtype = NUMPY_DTYPES[config["dtype"]]
    sources = [s for a in family.assemblies(family.translate(config, {})).values() for s in a.sources]
    return {s.name: rng.standard_normal(s.shape, dtype=np.float32).astype(dtype) for s in sources}


def write_checkpoint(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """Write `config.json` and `model.safetensors`; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def write_shards(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], count: int = 2) -> Path:
    """The same in `count` files with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    files = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, directory / file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def expected_parameters(tensors: dict[str, np.ndarray], num_layers: int, *, tied: bool) -> dict[str, np.ndarray]:
    """The decoder's parameters, made in the most obvious way: a second opinion on `families/tensors.py`."""
    params = {"embed.weight": tensors["model.embed_tokens.weight"], "norm.weight": tensors["model.norm.weight"]}
    if not tied:
        params["head.weight"] = tensors["lm_head.weight"]
    fused = {
        "attn_norm": ["input_layernorm"],
        "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attn.q_norm": ["self_attn.q_norm"],
        "attn.k_norm": ["self_attn.k_norm"],
        "attn.o": ["self_attn.o_proj"],
        "mlp_norm": ["post_attention_layernorm"],
        "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
    }
    for layer in range(num_layers):
        for target, sources in fused.items():
            for kind in ("weight", "bias"):
                names = [f"model.layers.{layer}.{source}.{kind}" for source in sources]
                if names[0] in tensors:
                    params[f"layers.{layer}.{target}.{kind}"] = np.concatenate([tensors[n].T for n in names], axis=-1)
    return params
