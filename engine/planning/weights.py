"""Bytes of a model's parameters on the device, from its config or its GGUF header: nothing is read but shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from engine.config import ModelLoadConfig
from models.config import ModelConfig
from models.errors import UnsupportedModelError
from models.functional import Params
from models.loading.dtypes import resolve_dtype
from models.loading.load import Checkpoint, choose_format, open_checkpoint
from models.loading.manifest import read_manifest
from models.parameters import parameter_shapes
from models.quantization.format import packed_bytes, packed_struct
from models.quantization.gguf import KINDS as BLOCK_KINDS
from models.quantization.gguf import Gguf
from models.quantization.schemes import KEEP_BLOCKS, Storage, storages_of


@dataclass(frozen=True)
class PlannedWeights:
    """What would be loaded.

    Attributes:
        config: the decoder.
        dtype: of what is not packed, and of activations.
        sizes: parameter -> bytes on the device.
        storages: of those that are packed while loading.
        kv_cache_dtype: that the checkpoint asks for.
    """

    config: ModelConfig
    dtype: np.dtype
    sizes: dict[str, int]
    storages: Mapping[str, Storage]
    kv_cache_dtype: str | None = None

    def shapes(self) -> Params:
        """Shapes of the parameters, to trace with."""
        return {
            name: packed_struct(shape, self.storages[name])
            if name in self.storages
            else jax.ShapeDtypeStruct(shape, self.dtype)  # type: ignore[misc]
            for name, shape in parameter_shapes(self.config).items()
        }


def plan_weights(load: ModelLoadConfig, path: Path, multiplies_e4m3: bool) -> PlannedWeights:
    """What loading these files would give.

    Args:
        load: dtype, format and quantization.
        path: of the model; weights need not be there.
        multiplies_e4m3: whether the device does.

    Raises:
        UnsupportedModelError: as `load_model`; or the checkpoint is quantized already: its sizes are in its weights.
    """
    chosen, quantization = choose_format(path, load.load_format), load.quantization
    if quantization == KEEP_BLOCKS and chosen != "gguf":
        raise UnsupportedModelError(f"quantization={KEEP_BLOCKS!r} is for GGUF files, and {path} is {chosen}.")
    if chosen == "orbax":
        config, checkpoint = read_manifest(path).config, None
    else:
        checkpoint = open_checkpoint(path, "safetensors" if chosen == "dummy" else chosen, quantization == KEEP_BLOCKS)
        config = checkpoint.config
    if checkpoint is not None and checkpoint.weight_format is not None and quantization != KEEP_BLOCKS:
        raise UnsupportedModelError(
            f"{path} is quantized already ({checkpoint.weight_format.name}): how large its weights are on the device "
            "is not in its config. Plan the unquantized model with the quantization that is nearest, such as int4_g128."
        )
    dtype = resolve_dtype(load.dtype, config)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in parameter_shapes(config).items()}
    storages: Mapping[str, Storage] = {}
    if quantization == KEEP_BLOCKS:
        assert checkpoint is not None, "blocks are of GGUF files"
        sizes |= _sizes_of_blocks(checkpoint, dtype)
    elif quantization is not None:
        storages = storages_of(config, quantization, multiplies_e4m3)
        sizes |= {name: packed_bytes(parameter_shapes(config)[name], storage) for name, storage in storages.items()}
    wanted = None if checkpoint is None else checkpoint.kv_cache_dtype
    return PlannedWeights(config, dtype, sizes, storages, wanted)


def _sizes_of_blocks(checkpoint: Checkpoint, dtype: np.dtype) -> dict[str, int]:
    """Parameters of which a matrix stays in a GGUF file's blocks -> bytes on the device."""
    source, form, sizes = checkpoint.open_tensors(), Gguf(), {}
    for name, assembly in checkpoint.family.assemblies(checkpoint.config).items():
        total, any_packed = 0, False
        for tensor in assembly.sources:
            stored = form.stored(name, tensor, source) if len(tensor.shape) == 2 else None
            if stored is None:
                total += math.prod(tensor.shape) * dtype.itemsize
                continue
            any_packed = True
            ((kind, blocks),) = stored.items()
            total += blocks.shape[0] * _bytes_of_row(kind, blocks.shape[1], dtype)
        if any_packed:
            sizes[name] = total
    return sizes


def _bytes_of_row(kind: str, num_bytes: int, dtype: np.dtype) -> int:
    """Of one output's weights: packed once, of zeros, by the code that loads them."""
    row = BLOCK_KINDS[kind].pack(np.zeros((1, num_bytes), np.uint8), dtype)
    return sum(array.on_device_size_in_bytes() for array in jax.tree.leaves(row))
