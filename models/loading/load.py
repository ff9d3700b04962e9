"""`load_model`: a model's files → config and parameters on the device. The one entry of this package."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from models.config import ModelConfig
from models.errors import ModelNotFoundError, UnsupportedModelError
from models.families.common import Family
from models.families.fields import RawConfig, strings
from models.functional import Params
from models.loading.assemble import assemble
from models.loading.dtypes import resolve_dtype
from models.loading.dummy import dummy_parameters
from models.loading.gguf import GgufTensors, gguf_config, read_gguf
from models.loading.gguf_file import part_paths
from models.loading.manifest import read_manifest
from models.loading.orbax import is_quire_checkpoint, load_checkpoint
from models.loading.safetensors import has_safetensors, open_safetensors
from models.loading.source import Progress, TensorSource
from models.quantization.checkpoints import checkpoint_format, kv_cache_dtype
from models.quantization.format import WeightFormat, summary
from models.quantization.gguf import Gguf
from models.quantization.on_load import OnLoad, storages_on_device
from models.quantization.schemes import KEEP_BLOCKS
from models.registry import resolve_family

logger = logging.getLogger(__name__)

CONFIG_NAME, GENERATION_CONFIG_NAME = "config.json", "generation_config.json"
FORMATS = ("safetensors", "gguf", "orbax", "dummy")


@dataclass(frozen=True)
class LoadedModel:
    """A model on the device.

    Attributes:
        config: the decoder.
        params: by name (`models.parameters.parameter_shapes`).
        quantization: in words, which parameters are packed and how; None if none is.
        kv_cache_dtype: in which the checkpoint wants keys and values to be kept; None if it does not say.
    """

    config: ModelConfig
    params: Params
    quantization: str | None = None
    kv_cache_dtype: str | None = None

    @property
    def dtype(self) -> str:
        """Of what is not packed, and of activations."""
        return str(jax.tree.leaves(self.params["norm.weight"])[0].dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, read as far as its config (`raw`, as `config.json` says it); `open_tensors` goes on to the
    weights, of which some matrices are stored in `weight_format` if they are quantized.
    """

    family: Family
    config: ModelConfig
    open_tensors: Callable[[], TensorSource]
    raw: RawConfig
    weight_format: WeightFormat | None = None
    kv_cache_dtype: str | None = None


def load_model(
    path: Path,
    load_format: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    quantization: str | None = None,
) -> LoadedModel:
    """Load a model onto the default device.

    Args:
        path: a directory with `config.json` and safetensors, a GGUF file (or a directory with one), or a directory that
            `save_checkpoint` made.
        load_format: one of `FORMATS`, or "auto" for what is there; "dummy" reads the config only and makes random
            weights.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own.
        seed: of dummy weights.
        progress: called after each parameter.
        quantization: None; a key of `models.quantization.schemes.SCHEMES`: the layers' matrices are rounded so; or
            `KEEP_BLOCKS`: matrices of a GGUF file stay in its blocks, as far as the device can hold them.

    Raises:
        ModelNotFoundError: the model, its config or its weights are not there.
        UnsupportedModelError: the architecture, a config value, a dtype, the format or the quantization is not
            supported, the checkpoint is quantized already, or is no GGUF file whose blocks could be kept.
        WeightsError: the files are damaged, or the weights do not fit the config.
    """
    chosen = choose_format(path, load_format)
    logger.info("load_format: %s (asked for: %s)", chosen, load_format)
    if quantization == KEEP_BLOCKS and chosen != "gguf":
        raise UnsupportedModelError(f"quantization={KEEP_BLOCKS!r} is for GGUF files, and {path} is {chosen}.")
    if chosen == "orbax":
        config, params = load_checkpoint(path, dtype, progress, quantization)
        return _loaded(config, params, quantization)
    if chosen == "dummy":
        config = read_config(path)
        storages = None if quantization is None else storages_on_device(config, quantization)
        params = dummy_parameters(config, resolve_dtype(dtype, config), seed, progress, storages)
        return _loaded(config, params, quantization)
    keeps_blocks = quantization == KEEP_BLOCKS  # `in (None, KEEP_BLOCKS)` would make it the default
    checkpoint = open_checkpoint(path, chosen, keeps_blocks)
    config, resolved = checkpoint.config, resolve_dtype(dtype, checkpoint.config)
    weight_format = checkpoint.weight_format
    if quantization not in (None, KEEP_BLOCKS):
        if weight_format is not None:
            raise UnsupportedModelError(
                f"This checkpoint is quantized already ({weight_format.name}): quantization={quantization!r} is for "
                "full-precision ones. Leave it out."
            )
        weight_format = OnLoad.of(quantization, config, checkpoint.family.assemblies(config))
    params = assemble(checkpoint.family, config, checkpoint.open_tensors(), resolved, progress, weight_format)
    loaded = _loaded(config, params, None if weight_format is None else weight_format.name)
    return replace(loaded, kv_cache_dtype=checkpoint.kv_cache_dtype)


def _loaded(config: ModelConfig, params: Params, quantization: str | None) -> LoadedModel:
    if quantization is None:
        return LoadedModel(config, params)
    about = summary(quantization, params)
    logger.info("quantization: %s", about)
    return LoadedModel(config, params, about)


def read_config(path: Path) -> ModelConfig:
    """The decoder that a model's files describe; no weights are read.

    Raises:
        As `load_model`.
    """
    chosen = choose_format(path, "auto")
    return read_manifest(path).config if chosen == "orbax" else open_checkpoint(path, chosen).config


def choose_format(path: Path, load_format: str) -> str:
    """The entry of `FORMATS` that applies; "auto" looks at the files.

    Raises:
        ModelNotFoundError: `path` does not exist.
        UnsupportedModelError: no such format.
    """
    if load_format not in ("auto", *FORMATS):
        raise UnsupportedModelError(f"load_format {load_format!r} is not known; known are auto, {', '.join(FORMATS)}.")
    if not path.exists():
        raise ModelNotFoundError(f"{path} does not exist.")
    if load_format != "auto":
        return load_format
    if path.is_file():
        return "gguf"
    if is_quire_checkpoint(path):
        return "orbax"
    if not has_safetensors(path) and any(path.glob("*.gguf")):
        return "gguf"
    return "safetensors"


def open_checkpoint(path: Path, load_format: str, keeps_blocks: bool = False) -> Checkpoint:
    """Read a model's config and find its family.

    Args:
        path: as for `load_model`.
        load_format: "safetensors" or "gguf".
        keeps_blocks: whether matrices of a GGUF file stay packed.

    Raises:
        As `load_model`.
    """
    if load_format == "gguf":
        file = read_gguf(_gguf_file(path))
        raw, generation = gguf_config(file), {}
        checkpoint = _checkpoint(raw, generation, lambda: GgufTensors(file, packed=keeps_blocks))
        return replace(checkpoint, weight_format=Gguf()) if keeps_blocks else checkpoint
    if not path.is_dir():
        raise ModelNotFoundError(
            f"{path} is not a directory: safetensors weights come with a {CONFIG_NAME} beside them."
        )
    if not (path / CONFIG_NAME).is_file():
        raise ModelNotFoundError(f"{path} has no {CONFIG_NAME}.")
    raw = read_json(path / CONFIG_NAME)
    checkpoint = _checkpoint(raw, read_generation_config(path), lambda: open_safetensors(path))
    return replace(
        checkpoint,
        weight_format=checkpoint_format(raw, lambda name: _side_file(path / name)),
        kv_cache_dtype=kv_cache_dtype(raw),
    )


def read_generation_config(path: Path) -> RawConfig:
    """What the model's authors say of generating with it: its `generation_config.json`, or {} where there is none.

    Raises:
        As `read_json`.
    """
    file = path / GENERATION_CONFIG_NAME
    return read_json(file) if file.is_file() else {}


def read_json(file: Path) -> RawConfig:
    """A JSON object.

    Raises:
        UnsupportedModelError: the file holds something else; says where it breaks.
        ModelNotFoundError: it cannot be read.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelNotFoundError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UnsupportedModelError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{file} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _side_file(file: Path) -> RawConfig | None:
    return read_json(file) if file.is_file() else None


def _checkpoint(raw: RawConfig, generation: RawConfig, open_tensors: Callable[[], TensorSource]) -> Checkpoint:
    family = resolve_family(strings(raw, "architectures") or ())
    return Checkpoint(family, family.translate(raw, generation), open_tensors, raw)


def _gguf_file(path: Path) -> Path:
    """The GGUF file that is meant: `path` itself, or the only model in that directory, whole or in parts."""
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if not files:
        raise ModelNotFoundError(f"{path} has no *.gguf file.")
    if len(files) > 1 and sorted(part_paths(files[0])) != files:
        raise ModelNotFoundError(
            f"{path} has {len(files)} GGUF files; name one of them: {', '.join(f.name for f in files)}."
        )
    return files[0]
