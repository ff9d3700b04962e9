"""From which tensors of a Hugging Face checkpoint each decoder parameter is assembled.

q_proj [H*D,E] ┐
k_proj [K*D,E] ├─ each transposed, side by side ─▶ attn.qkv.weight [E,(H+2K)*D]
v_proj [K*D,E] ┘
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import ModelConfig

FLOATS = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint.

    Attributes:
        name: Hugging Face's.
        shape: the one that it must have; projections are `[out, in]`.
        dtypes: names of those that it may have.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS


@dataclass(frozen=True)
class Assembly:
    """One parameter: its sources side by side along the last axis, each transposed first if `transpose`."""

    sources: tuple[SourceTensor, ...]
    transpose: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        shapes = [source.shape[::-1] if self.transpose else source.shape for source in self.sources]
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


# Buffers that old checkpoints carry and nothing needs.
HARMLESS_SUFFIXES = ("rotary_emb.inv_freq",)


def decoder_tensors(config: ModelConfig) -> dict[str, Assembly]:
    """The names that Llama gave and all families here kept, for every parameter of the decoder."""
    model, vocab = config.hidden_size, config.vocab_size
    assemblies = {"embed.weight": plain("model.embed_tokens.weight", vocab, model)}
    for index in range(config.num_layers):
        assemblies |= layer_tensors(config, f"layers.{index}.", f"model.layers.{index}.")
    assemblies["norm.weight"] = plain("model.norm.weight", model)
    if not config.tie_word_embeddings:
        assemblies["head.weight"] = plain("lm_head.weight", vocab, model)
    return assemblies


def is_harmless_extra(name: str, config: ModelConfig) -> bool:
    """True for tensors that no parameter needs and that a sound checkpoint may still hold."""
    return name.endswith(HARMLESS_SUFFIXES) or (config.tie_word_embeddings and name == "lm_head.weight")


def layer_tensors(config: ModelConfig, to: str, source: str, num_in: int | None = None) -> dict[str, Assembly]:
    """The parameters of one layer.

    Args:
        config: of the decoder.
        to, source: prefixes of the parameters and of the tensors.
        num_in: what attention reads of a token, if not the model's width.
    """
    model, ffn, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    attention, mlp = f"{source}self_attn.", f"{source}mlp."
    qkv = {f"{attention}q_proj": q, f"{attention}k_proj": kv, f"{attention}v_proj": kv}
    gate_up = {f"{mlp}gate_proj": ffn, f"{mlp}up_proj": ffn}
    tensors = {
        "attn_norm.weight": plain(f"{source}input_layernorm.weight", model),
        **projection("attn.qkv", qkv, num_in or model, bias=config.qkv_bias),
        **projection("attn.o", {f"{attention}o_proj": model}, q, bias=config.o_bias),
        "mlp_norm.weight": plain(f"{source}post_attention_layernorm.weight", model),
        **projection("mlp.gate_up", gate_up, model, bias=config.mlp_bias),
        **projection("mlp.down", {f"{mlp}down_proj": model}, ffn, bias=config.mlp_bias),
    }
    if config.qk_norm:
        tensors["attn.q_norm.weight"] = plain(f"{attention}q_norm.weight", config.head_dim)
        tensors["attn.k_norm.weight"] = plain(f"{attention}k_norm.weight", config.head_dim)
    return {to + name: assembly for name, assembly in tensors.items()}


def projection(target: str, outputs: dict[str, int], width_in: int, *, bias: bool) -> dict[str, Assembly]:
    """Weight (and bias) of one fused projection; `outputs` maps each module to its number of outputs."""
    weights = tuple(SourceTensor(f"{name}.weight", (width, width_in)) for name, width in outputs.items())
    assemblies = {f"{target}.weight": Assembly(weights, transpose=True)}
    if bias:
        assemblies[f"{target}.bias"] = Assembly(
            tuple(SourceTensor(f"{n}.bias", (width,)) for n, width in outputs.items())
        )
    return assemblies


def plain(name: str, *shape: int) -> Assembly:
    """A parameter that is a tensor of the checkpoint as it is."""
    return Assembly((SourceTensor(name, shape),))
