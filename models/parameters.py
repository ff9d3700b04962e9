"""Which parameters a decoder has: names and shapes. Loading and the decoder both answer to this one specification.

Letters: E model dim, H query heads, K kv heads, D head dim, F ffn, V vocab. Weights are `[in, out]`, q/k/v and
gate/up fused, ready to serve. No jax here.
"""

from __future__ import annotations

from models.config import ModelConfig


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order in which the forward pass meets them.

        embed.weight [V,E]   layers.{i}.…   norm.weight [E]   head.weight [V,E] (only if not tied to the embedding)

    Along the last axis, `attn.qkv` holds q heads, then k heads, then v heads; `mlp.gate_up` holds gate, then up.
    """
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, config.hidden_size)}
    layer = layer_parameter_shapes(config)
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def output_sizes(config: ModelConfig, name: str) -> tuple[int, ...]:
    """Outputs of the projections that lie side by side in a layer's matrix."""
    if name.endswith("attn.qkv.weight"):
        return config.q_size, config.kv_size, config.kv_size
    if name.endswith("mlp.gate_up.weight"):
        return config.intermediate_size, config.intermediate_size
    return (parameter_shapes(config)[name][-1],)


def layer_parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name (without `layers.{i}.`) and shape of the parameters of one layer; all layers have the same."""
    model, ffn = config.hidden_size, config.intermediate_size
    qkv = config.q_size + 2 * config.kv_size
    shapes: dict[str, tuple[int, ...]] = {"attn_norm.weight": (model,), "attn.qkv.weight": (model, qkv)}
    if config.qkv_bias:
        shapes["attn.qkv.bias"] = (qkv,)
    if config.qk_norm:
        shapes |= {"attn.q_norm.weight": (config.head_dim,), "attn.k_norm.weight": (config.head_dim,)}
    shapes["attn.o.weight"] = (config.q_size, model)
    if config.o_bias:
        shapes["attn.o.bias"] = (model,)
    shapes |= {"mlp_norm.weight": (model,), "mlp.gate_up.weight": (model, 2 * ffn)}
    if config.mlp_bias:
        shapes["mlp.gate_up.bias"] = (2 * ffn,)
    shapes["mlp.down.weight"] = (ffn, model)
    if config.mlp_bias:
        shapes["mlp.down.bias"] = (model,)
    return shapes
