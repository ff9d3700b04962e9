"""`load_head`: a head's files -> config and parameters on the device, checked against the decoder that it is for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.drafters.config import EagleConfig, MedusaConfig, eagle_config, medusa_config
from models.drafters.tensors import (
    EAGLE_PREFIXES,
    HARMLESS,
    MEDUSA_PREFIXES,
    VOCAB_NAMES,
    eagle_tensors,
    medusa_tensors,
)
from models.errors import ModelNotFoundError, UnsupportedModelError, WeightsError
from models.families.fields import RawConfig
from models.families.tensors import Assembly
from models.functional import Params
from models.loading.assemble import assemble_parameters, check_assemblies
from models.loading.load import CONFIG_NAME, read_json
from models.loading.safetensors import open_safetensors
from models.loading.source import TensorSource

_SEQUENTIAL = re.compile(r"^\d+\.\d+\.")
_QUANTIZED_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class LoadedHead[C: (MedusaConfig, EagleConfig)]:
    """A head on the device: its config, and its parameters by name."""

    config: C
    params: Params


class _Renamed:
    """A `TensorSource` whose names lack a prefix.

    Raises:
        WeightsError: two tensors would have the same name.
    """

    def __init__(self, source: TensorSource, prefixes: tuple[str, ...]) -> None:
        self._source = source
        self._names: dict[str, str] = {}
        for stored in source.names():
            name = next((stored.removeprefix(prefix) for prefix in prefixes if stored.startswith(prefix)), stored)
            if name in self._names:
                raise WeightsError(f"The head's checkpoint has both {self._names[name]} and {stored}.")
            self._names[name] = stored

    def names(self) -> Collection[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def dtype(self, name: str) -> str:
        return self._source.dtype(self._names[name])

    def read(self, name: str) -> np.ndarray:
        return self._source.read(self._names[name])


def load_medusa(path: Path, target: ModelConfig, dtype: np.dtype) -> LoadedHead[MedusaConfig]:
    """Load Medusa heads onto the default device.

    Args:
        path: a directory with `config.json` and safetensors, in the authors' layout or in vLLM's.
        target: the decoder that they are for.
        dtype: to serve in.

    Raises:
        ModelNotFoundError: the config or the weights are not there; a pickle (`medusa_lm_head.pt`) is none.
        UnsupportedModelError: a config value, or it contradicts the target.
        WeightsError: the files are damaged, or the tensors do not fit the config.
    """
    raw, source = _open(path, MEDUSA_PREFIXES)
    sequential = any(_SEQUENTIAL.match(name) for name in source.names())
    config = medusa_config(raw, target, bias=any(name.endswith(".bias") for name in source.names()))
    params = _assemble("medusa", medusa_tensors(config, sequential=sequential), source, dtype)
    if config.maps_vocab:
        ids = _integers(source, "token_map", config.draft_vocab_size)
        params["target_ids.ids"] = _target_ids("token_map", ids, config.vocab_size)
    return LoadedHead(config, params)


def load_eagle(
    path: Path, kind: str, target: ModelConfig, target_params: Params, dtype: np.dtype
) -> LoadedHead[EagleConfig]:
    """Load an EAGLE or EAGLE-3 head onto the default device.

    Args:
        path: a directory with `config.json` and safetensors.
        kind: "eagle" or "eagle3".
        target, target_params: the decoder that it is for. An embedding table that is the same is not kept twice.
        dtype: to serve in.

    Raises:
        As `load_medusa`.
    """
    raw, source = _open(path, EAGLE_PREFIXES)
    names = source.names()
    config = replace(
        eagle_config(raw, target, kind),
        fc_bias="fc.bias" in names,
        own_embed="embed_tokens.weight" in names,
        own_head="lm_head.weight" in names,
    )
    if config.maps_vocab and not config.own_head:
        raise WeightsError(
            f"The head's checkpoint has no lm_head.weight, and its draft_vocab_size ({config.draft_vocab_size}) is not "
            f"the model's vocab_size ({target.vocab_size}): the model's head cannot stand in."
        )
    if not config.own_embed and config.decoder.hidden_size != target.hidden_size:
        raise WeightsError(
            f"The head's checkpoint has no embed_tokens.weight, and its hidden_size ({config.decoder.hidden_size}) is "
            f"not the model's ({target.hidden_size}): the model's table cannot stand in."
        )
    layer = "midlayer" if any(name.startswith("midlayer.") for name in names) else "layers.0"
    params = _assemble(kind, eagle_tensors(config, layer), source, dtype)
    if config.maps_vocab:
        params["target_ids.ids"] = _eagle_vocab(source, config)
    if config.own_embed and _same(params["embed.weight"], target_params["embed.weight"]):
        del params["embed.weight"]
        config = replace(config, own_embed=False)
    return LoadedHead(config, params)


def _open(path: Path, prefixes: tuple[str, ...]) -> tuple[RawConfig, _Renamed]:
    if not (path / CONFIG_NAME).is_file():
        raise ModelNotFoundError(f"{path} has no {CONFIG_NAME}: a head is a directory with it and *.safetensors.")
    raw = read_json(path / CONFIG_NAME)
    for key in _QUANTIZED_KEYS:
        if raw.get(key):
            raise UnsupportedModelError(f"{path / CONFIG_NAME}: {key} is there: quantized heads are not supported.")
    return raw, _Renamed(open_safetensors(path), prefixes)


def _assemble(kind: str, assemblies: Mapping[str, Assembly], source: TensorSource, dtype: np.dtype) -> Params:
    def harmless(name: str) -> bool:
        return name in VOCAB_NAMES or name.endswith(HARMLESS)

    check_assemblies(f"{kind} head", assemblies, source, harmless)
    shapes = {name: assembly.shape for name, assembly in assemblies.items()}
    return dict(assemble_parameters(shapes, assemblies, source, dtype))


def _integers(source: TensorSource, name: str, count: int) -> np.ndarray:
    """int64[count]."""
    if name not in source.names():
        raise WeightsError(f"The head knows {count} tokens only, and its checkpoint has no {name} that says which.")
    found = source.read(name)
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise WeightsError(f"{name} is {found.dtype.name}{list(found.shape)}, expected integers [{count}].")
    return found.astype(np.int64)


def _eagle_vocab(source: TensorSource, config: EagleConfig) -> jax.Array:
    """`d2t` holds the distance from the head's id to the target's; `t2d` marks the same tokens, if it is there."""
    size, vocab = config.draft_vocab_size, config.decoder.vocab_size
    ids = np.arange(size) + _integers(source, "d2t", size)
    on_device = _target_ids("d2t", ids, vocab)
    if "t2d" in source.names():
        marked = source.read("t2d")
        if marked.shape != (vocab,) or not np.array_equal(np.flatnonzero(marked), np.sort(ids)):
            raise WeightsError(f"t2d {list(marked.shape)} does not mark the {size} of {vocab} tokens that d2t names.")
    return on_device


def _target_ids(name: str, ids: np.ndarray, vocab_size: int) -> jax.Array:
    if ids.min() < 0 or ids.max() >= vocab_size or len(np.unique(ids)) != len(ids):
        raise WeightsError(
            f"{name} does not name {len(ids)} different tokens of {vocab_size}: they are from {ids.min()} to "
            f"{ids.max()}, {len(np.unique(ids))} different ones."
        )
    return jnp.asarray(ids, jnp.int32)


def _same(table: object, other: object) -> bool:
    return (
        isinstance(table, jax.Array)
        and isinstance(other, jax.Array)
        and table.shape == other.shape
        and table.dtype == other.dtype
        and bool(jnp.array_equal(table, other))
    )
