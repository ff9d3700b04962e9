"""Random heads that tests write for themselves, and what they compute, in numpy from the papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]


def eagle_raw(target: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """`config.json` of a head for a target with this `config.json`."""
    keys = ("vocab_size", "hidden_size", "rope_parameters", "max_position_embeddings", "dtype")
    sizes = {
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "rms_norm_eps": 1e-5,
        "architectures": ["LlamaForCausalLM"],
    }
    return {key: target[key] for key in keys} | sizes | changes


def _random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def _layer(raw: Mapping[str, Any], name: str, width: int, rng: np.random.Generator) -> Tensors:
    size, ffn, dim = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    q, kv = raw["num_attention_heads"] * dim, raw["num_key_value_heads"] * dim
    return {
        f"{name}.self_attn.q_proj.weight": _random(rng, q, width),
        f"{name}.self_attn.k_proj.weight": _random(rng, kv, width),
        f"{name}.self_attn.v_proj.weight": _random(rng, kv, width),
        f"{name}.self_attn.o_proj.weight": _random(rng, size, q),
        f"{name}.post_attention_layernorm.weight": 1 + _random(rng, size),
        f"{name}.mlp.gate_proj.weight": _random(rng, ffn, size),
        f"{name}.mlp.up_proj.weight": _random(rng, ffn, size),
        f"{name}.mlp.down_proj.weight": _random(rng, size, ffn),
    }


def eagle_random(raw: Mapping[str, Any], seed: int = 0, *, bias: bool = True) -> Tensors:
    """Tensors of an EAGLE head."""
    rng, size = np.random.default_rng(seed), raw["hidden_size"]
    tensors = {"fc.weight": _random(rng, size, 2 * size), **_layer(raw, "layers.0", size, rng)}
    for index in range(1, raw["num_hidden_layers"]):
        tensors |= _layer(raw, f"layers.{index}", size, rng)
        tensors[f"layers.{index}.input_layernorm.weight"] = 1 + _random(rng, size)
    return tensors | ({"fc.bias": _random(rng, size)} if bias else {})


def eagle3_random(raw: Mapping[str, Any], target_size: int, seed: int = 0, name: str = "midlayer") -> Tensors:
    """Tensors of an EAGLE-3 head whose tokens are spread over the target's."""
    rng, size, vocab = np.random.default_rng(seed), raw["hidden_size"], raw["vocab_size"]
    tensors = {"fc.weight": _random(rng, size, 3 * target_size), **_layer(raw, name, 2 * size, rng)}
    for norm in (f"{name}.input_layernorm", f"{name}.hidden_norm", "norm"):
        tensors[f"{norm}.weight"] = 1 + _random(rng, size)
    known = raw.get("draft_vocab_size", vocab)
    ids = np.sort(rng.choice(vocab, known, replace=False))
    marked = np.zeros(vocab, bool)
    marked[ids] = True
    return tensors | {"lm_head.weight": _random(rng, known, size), "d2t": ids - np.arange(known), "t2d": marked}


def medusa_random(size: int, vocab: int, heads: int, layers: int, seed: int = 0) -> Tensors:
    """Tensors of Medusa heads in the authors' layout."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for head in range(heads):
        for layer in range(layers):
            tensors[f"{head}.{layer}.linear.weight"] = _random(rng, size, size)
            tensors[f"{head}.{layer}.linear.bias"] = _random(rng, size)
        tensors[f"{head}.{layers}.weight"] = _random(rng, vocab, size)
    return tensors


def silu(x: np.ndarray) -> np.ndarray:
    """x times its sigmoid."""
    return x / (1 + np.exp(-x))


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _rotated(x: np.ndarray, theta: float) -> np.ndarray:
    """[T, H, D], row t at position t."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[0])[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def _attention(raw: Mapping[str, Any], tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    dim, heads, theta = raw["head_dim"], raw["num_attention_heads"], raw["rope_parameters"]["rope_theta"]
    q, k, v = (x @ tensors[f"{name}.self_attn.{p}_proj.weight"].T for p in "qkv")
    q, k, v = (part.reshape(len(x), -1, dim) for part in (q, k, v))
    q, k = _rotated(q, theta), _rotated(k, theta)
    out = np.zeros_like(q)
    for head in range(heads):
        shared = head * k.shape[1] // heads
        scores = q[:, head] @ k[:, shared].T / np.sqrt(dim)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, shared]
    return out.reshape(len(x), -1) @ tensors[f"{name}.self_attn.o_proj.weight"].T


def _rest_of_layer(raw: Mapping[str, Any], tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    y = norm(x, tensors[f"{name}.post_attention_layernorm.weight"], raw["rms_norm_eps"])
    gate, up = (y @ tensors[f"{name}.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (silu(gate) * up) @ tensors[f"{name}.mlp.down_proj.weight"].T


def eagle_reference(raw: Mapping[str, Any], tensors: Tensors, embedded: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Features that an EAGLE head gives for a whole sequence."""
    x = np.concatenate([embedded, features], -1) @ tensors["fc.weight"].T + tensors.get("fc.bias", 0)
    for index in range(raw["num_hidden_layers"]):
        name = f"layers.{index}"
        read = x if index == 0 else norm(x, tensors[f"{name}.input_layernorm.weight"], raw["rms_norm_eps"])
        x = _rest_of_layer(raw, tensors, name, x + _attention(raw, tensors, name, read))
    return x


def eagle3_reference(
    raw: Mapping[str, Any], tensors: Tensors, embedded: np.ndarray, x: np.ndarray, name: str = "midlayer"
) -> np.ndarray:
    """Features that an EAGLE-3 head gives for a whole sequence; `x` are projected features, or its own."""
    eps = raw["rms_norm_eps"]
    normed = norm(x, tensors[f"{name}.hidden_norm.weight"], eps)
    read = np.concatenate([norm(embedded, tensors[f"{name}.input_layernorm.weight"], eps), normed], -1)
    base = normed if raw.get("norm_before_residual") else x
    return _rest_of_layer(raw, tensors, name, base + _attention(raw, tensors, name, read))
