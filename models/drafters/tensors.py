"""From which checkpoint tensors each parameter of a head is made. Names are as the layouts have them, less prefixes."""

from __future__ import annotations

from models.config import ModelConfig
from models.drafters.config import EagleConfig, MedusaConfig
from models.families.tensors import Assembly, layer_tensors, plain, projection

MEDUSA_PREFIXES = ("medusa_heads.", "medusa_head.")
EAGLE_PREFIXES = ("model.",)
VOCAB_NAMES = ("d2t", "t2d", "token_map")  # integers: made by hand
HARMLESS = ("rotary_emb.inv_freq",)


def medusa_tensors(config: MedusaConfig, *, sequential: bool) -> dict[str, Assembly]:
    """Every parameter of Medusa heads.

    Args:
        config: of the heads.
        sequential: the authors' names (`{head}.{block}.linear.weight`, `{head}.{blocks}.weight`), not vLLM's
            (`blocks.{head}.layers.{block}.weight`, `lm_heads.{head}.weight`).
    """
    size, vocab = config.hidden_size, config.draft_vocab_size
    assemblies: dict[str, Assembly] = {}
    for head in range(config.num_heads):
        for block in range(config.num_layers):
            source = f"{head}.{block}.linear" if sequential else f"blocks.{head}.layers.{block}"
            assemblies |= projection(f"blocks.{head}.{block}", {source: size}, size, bias=config.bias)
    for head in range(1 if config.shared_head else config.num_heads):
        source = f"{head}.{config.num_layers}" if sequential else f"lm_heads.{head}"
        assemblies[f"heads.{head}.weight"] = plain(f"{source}.weight", vocab, size)
    return assemblies


def eagle_tensors(config: EagleConfig, layer_name: str = "layers.0") -> dict[str, Assembly]:
    """Every parameter of an EAGLE or EAGLE-3 head.

    Args:
        config: of the head.
        layer_name: of the first layer in the checkpoint: `layers.0`, or `midlayer`.
    """
    decoder = config.decoder
    size = decoder.hidden_size
    num_in = len(config.taps) * config.target_hidden_size if config.is_eagle3 else 2 * size
    assemblies: dict[str, Assembly] = {}
    if config.own_embed:
        assemblies["embed.weight"] = plain("embed_tokens.weight", decoder.vocab_size, size)
    assemblies |= projection("fc", {"fc": size}, num_in, bias=config.fc_bias)
    first = _first_layer(decoder, f"{layer_name}.", 2 * size if config.is_eagle3 else size)
    if config.is_eagle3:
        first["embed_norm.weight"] = plain(f"{layer_name}.input_layernorm.weight", size)
        first["hidden_norm.weight"] = plain(f"{layer_name}.hidden_norm.weight", size)
        assemblies["norm.weight"] = plain("norm.weight", size)
    assemblies |= {f"first.{name}": assembly for name, assembly in first.items()}
    for index in range(1, decoder.num_layers):
        assemblies |= layer_tensors(decoder, f"rest.{index - 1}.", f"layers.{index}.")
    if config.own_head:
        assemblies["head.weight"] = plain("lm_head.weight", config.draft_vocab_size, size)
    return assemblies


def _first_layer(decoder: ModelConfig, source: str, num_in: int) -> dict[str, Assembly]:
    """A layer of the decoder without the norm in front of it, whose attention reads `num_in` numbers a token."""
    tensors = layer_tensors(decoder, "", source, num_in)
    del tensors["attn_norm.weight"]
    return tensors
