"""A model's own weights once more, packed: what drafts for it where reading fewer bytes is faster.

The idea is that of QSpec (Zhao et al. 2024, arXiv 2410.11305): the packed model reads and writes the pages of the whole
one, so that it needs no memory for keys and values, never lags, and errs in the tokens of one step only.
"""

from __future__ import annotations

from dataclasses import replace

import jax

from engine.errors import ConfigError
from models.config import ModelConfig
from models.errors import UnsupportedModelError
from models.functional import Params
from models.parameters import output_sizes
from models.quantization.on_load import pack_parameter, storages_on_device
from models.quantization.schemes import SCHEMES, norm_of
from pallas_kernels.device import current_device

EMBEDDING, HEAD = "embed.weight", "head.weight"


def quantized_copy(config: ModelConfig, params: Params, scheme: str) -> tuple[ModelConfig, Params]:
    """A decoder that differs in how its matrices are stored. Its head is packed too, and no longer the embedding table.

    Args:
        config: of the decoder.
        params: its weights, dense. What is not packed is shared.
        scheme: key of `SCHEMES`.

    Raises:
        ConfigError: the scheme is not known or does not fit the model, or the weights are packed already.
    """
    try:
        storages = storages_on_device(config, scheme)
    except UnsupportedModelError as error:
        raise ConfigError(f"speculative_config: {error}") from error
    dense = {name: weight for name, weight in params.items() if isinstance(weight, jax.Array)}
    if not dense.keys() >= storages.keys():
        raise ConfigError(
            "speculative_config: quantization packs the model's own weights once more to draft with, "
            "and this model's are packed already. Leave quantization out."
        )
    packed = dict(params)
    for name, storage in storages.items():
        norm = norm_of(name)
        packed[name] = pack_parameter(
            dense[name], output_sizes(config, name), storage, None if norm is None else dense[norm]
        )
    table = dense.get(EMBEDDING if config.tie_word_embeddings else HEAD)
    storage = SCHEMES[scheme].storage(config.hidden_size, current_device().multiplies_e4m3)
    if storage is not None and table is not None:
        packed[HEAD] = pack_parameter(table.T, (config.vocab_size,), storage, None)
        config = replace(config, tie_word_embeddings=False)
    return config, packed


def added_bytes(params: Params, packed: Params) -> int:
    """What the copy takes besides the weights that it shares."""
    own = [packed[name] for name in packed if packed[name] is not params.get(name)]
    return sum(array.on_device_size_in_bytes() for array in jax.tree.leaves(own))
