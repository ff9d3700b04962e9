"""Quire checkpoints: fused parameters, ready to serve, as an Orbax checkpoint that loads at the speed of the disk.

    <path>/quire.json       ModelConfig and dtype (`manifest.py`)
    <path>/weights/         Orbax: one directory per parameter (Zarr v2), no OCDBT, no compression, one chunk each
    <path>/config.json …    the original model's config and tokenizer files, copied

Any Orbax reads `weights/`. Loading does not go through it: with these settings a parameter's only chunk file *is* the
array in C order, so it is read straight into the buffer that the device takes over. That skips Orbax's fixed cost and
TensorStore's copies; the tests hold the two ways equal. A checkpoint whose arrays are stored in any other
layout (sharded over devices when it was saved, or re-saved with other settings) is restored by Orbax itself.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from models.config import ModelConfig
from models.errors import WeightsError
from models.layers.product import Weight
from models.loading.dtypes import SERVING_DTYPES, resolve_dtype
from models.loading.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from models.loading.source import Progress
from models.loading.transfer import NUM_THREADS, Packed, aligned_empty, shares, stream_to_device, total_bytes
from models.parameters import output_sizes, parameter_shapes
from models.quantization.format import packed_bytes
from models.quantization.on_load import pack_parameter, storages_on_device
from models.quantization.schemes import Storage, norm_of

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "weights"
ORBAX_METADATA_NAME = "_METADATA"
_PAGE_BYTES = 4096
COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE",
)


def is_quire_checkpoint(directory: Path) -> bool:
    """True if `save_checkpoint` made this directory."""
    return (directory / MANIFEST_NAME).is_file()


def save_checkpoint(
    params: Mapping[str, Weight], config: ModelConfig, path: Path, originals: Path | None = None
) -> None:
    """Write a checkpoint; `path` appears complete or not at all.

    Args:
        params: every parameter of the decoder, of one serving dtype, none of them packed.
        config: the decoder.
        path: a directory that does not exist yet.
        originals: the model's directory, whose `COPIED_FILES` come along (tokenizer, configs).

    Raises:
        WeightsError: the parameters are not the decoder's, or `path` exists or cannot be written.
    """
    arrays = {name: weight for name, weight in params.items() if isinstance(weight, jax.Array)}
    _check_shapes({name: array.shape for name, array in arrays.items()}, config, "the parameters to save")
    dtypes = {str(array.dtype) for array in arrays.values()}
    if len(dtypes) != 1 or not dtypes <= SERVING_DTYPES.keys():
        raise WeightsError(
            f"Parameters must share one dtype of {', '.join(SERVING_DTYPES)}; found {', '.join(sorted(dtypes))}."
        )
    if path.exists():
        raise WeightsError(f"{path} exists already; name a new directory or remove it first.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            partial.chmod(0o755)  # mkdtemp's directory is for its owner only
            with ocp.Checkpointer(_handler()) as checkpointer:
                checkpointer.save(partial.absolute() / WEIGHTS_NAME, args=ocp.args.PyTreeSave(arrays))
            write_manifest(partial, Manifest(config, dtypes.pop()))
            if originals is not None:
                _copy_files(originals, partial)
            os.rename(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error}.") from error


def load_checkpoint(
    path: Path, dtype: str = "auto", progress: Progress | None = None, quantization: str | None = None
) -> tuple[ModelConfig, dict[str, Weight]]:
    """Load a checkpoint onto the default device.

    Args:
        path: of the checkpoint.
        dtype: "auto" is the one it was saved in.
        progress: called after each parameter.
        quantization: key of `models.quantization.schemes.SCHEMES`: how matrices are stored, made one at a time.

    Raises:
        ModelNotFoundError: `path` is not a Quire checkpoint.
        UnsupportedModelError: no such dtype, or the model cannot be quantized so.
        WeightsError: an array is missing, truncated or misshapen, or `quire.json` is corrupted.
    """
    manifest = read_manifest(path)
    config, weights = manifest.config, path / WEIGHTS_NAME
    storages = {} if quantization is None else storages_on_device(config, quantization)
    stored = resolve_dtype(manifest.dtype, config)
    served = stored if dtype == "auto" else resolve_dtype(dtype, config)
    layouts = {file.parent.name: _read_layout(file) for file in weights.glob("*/.zarray")}
    other_format = not layouts and (weights / ORBAX_METADATA_NAME).is_file()
    if not other_format:
        _check_shapes({name: tuple(layout["shape"]) for name, layout in layouts.items()}, config, str(weights))
    if other_format or not all(_is_raw(layout, stored) for layout in layouts.values()):
        logger.info("%s is not stored as plain arrays: Orbax restores it", weights)
        restored = _restore_with_orbax(weights, config, served, progress)
        return config, {
            name: _pack(name, array, config, storages[name], restored.get(norm_of(name) or ""))
            if name in storages
            else array
            for name, array in restored.items()
        }

    shapes = parameter_shapes(config)
    with ThreadPoolExecutor(NUM_THREADS) as pool:

        def fill(name: str, host: np.ndarray) -> None:
            file = weights / name / ".".join(["0"] * host.ndim)
            buffer = host if host.dtype == stored else np.empty(host.shape, stored)
            _read_into(file, buffer, pool)
            if buffer is not host:
                host[...] = buffer

        def norm_before(name: str) -> jax.Array | None:
            norm = norm_of(name)
            if norm is None or storages[name].num_scales == 1:
                return None
            host = np.empty(shapes[norm], stored)
            fill(norm, host)
            return jax.device_put(host)

        def pack(name: str) -> Weight:
            host = aligned_empty(shapes[name], stored)
            fill(name, host)
            return _pack(name, jax.device_put(host), config, storages[name], norm_before(name))

        sizes = {name: packed_bytes(shapes[name], storage) for name, storage in storages.items()}
        return config, stream_to_device(shapes, served, fill, progress, Packed(sizes, pack))


def _pack(name: str, matrix: jax.Array, config: ModelConfig, storage: Storage, norm: jax.Array | None) -> Weight:
    try:
        return pack_parameter(matrix, output_sizes(config, name), storage, norm)
    except WeightsError as error:
        raise WeightsError(f"{name}: {error}") from error


def _copy_files(source: Path, target: Path) -> None:
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)


def _check_shapes(found: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    expected = parameter_shapes(config)
    faults = [
        f"{name}: expected {list(expected[name]) if name in expected else 'none'}, "
        f"found {list(found[name]) if name in found else 'none'}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise WeightsError(f"{where}: {len(faults)} parameters are not the decoder's: {'; '.join(faults[:3])}{more}.")


def _read_layout(file: Path) -> dict:
    """A parameter's `.zarray` (Zarr v2 specification, "Metadata")."""
    try:
        layout = json.loads(file.read_bytes())
        return {key: layout[key] for key in ("shape", "chunks", "dtype", "order", "compressor", "filters")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{file} is corrupted: {type(error).__name__}: {error}.") from error


def _is_raw(layout: dict, dtype: np.dtype) -> bool:
    """True if the one chunk file is the array in C order."""
    return (
        layout["chunks"] == layout["shape"]
        and layout["order"] == "C"
        and layout["compressor"] is None
        and layout["filters"] is None
        and layout["dtype"] in (dtype.name, dtype.str)
    )


def _read_into(file: Path, array: np.ndarray, pool: ThreadPoolExecutor) -> None:
    """Fill `array` with the whole file, in as many pieces at a time as `pool` has threads."""
    try:
        with file.open("rb", buffering=0) as stream:
            descriptor = stream.fileno()
            size = os.fstat(descriptor).st_size
            if size != array.nbytes:
                kind = "truncated" if size < array.nbytes else "corrupted"
                raise WeightsError(f"{file} is {kind}: it has {size} bytes, {list(array.shape)} needs {array.nbytes}.")
            view = memoryview(array.view(np.uint8).reshape(-1))
            pieces = shares(size, _PAGE_BYTES, size)
            # list(): an exception of a thread is raised here.
            list(pool.map(lambda piece: _read_piece(descriptor, view[piece], piece.start), pieces))
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error}.") from error


def _read_piece(descriptor: int, view: memoryview, offset: int) -> None:
    while view:  # one call reads at most 2 GiB
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise OSError("it became shorter while it was read")
        view, offset = view[count:], offset + count


def _restore_with_orbax(
    weights: Path, config: ModelConfig, dtype: np.dtype, progress: Progress | None
) -> dict[str, jax.Array]:
    """The general way: whatever layout Orbax itself can read."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = parameter_shapes(config)
    item = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=device) for name, shape in shapes.items()}
    restore_args = {
        name: ocp.ArrayRestoreArgs(sharding=device, global_shape=shape, dtype=dtype, strict=True)
        for name, shape in shapes.items()
    }
    try:
        with ocp.Checkpointer(_handler()) as checkpointer:
            params = checkpointer.restore(
                weights.absolute(), args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
            )
    except (ValueError, KeyError, OSError) as error:
        raise WeightsError(f"{weights}: Orbax cannot restore it: {error}.") from error
    if progress is not None:
        size = total_bytes(shapes, dtype)
        progress(size, size, WEIGHTS_NAME)
    return jax.block_until_ready(params)
