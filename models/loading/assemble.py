"""Checkpoint tensors → the decoder's fused parameters: checked all at once, then made and sent one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.errors import WeightsError
from models.families.common import Family
from models.families.tensors import Assembly, SourceTensor, is_harmless_extra
from models.layers.product import Matrix, Weight
from models.loading.source import Progress, TensorSource
from models.loading.transfer import NUM_THREADS, Packed, aligned_empty, shares, stream_to_device
from models.parameters import parameter_shapes
from models.quantization.format import WeightFormat, side_by_side

_LISTED = 3  # faults that an error spells out
# Rows transposed together: their elements of one column fill a cache line of the result. Measured on 2 cores: 5 to 10
# times as fast as assigning the whole transpose.
_CACHE_LINE_BYTES = 64
_TILE_BYTES = 1 << 18  # rows cast together where nothing is transposed


def check_tensors(
    family: Family, config: ModelConfig, source: TensorSource, weight_format: WeightFormat | None = None
) -> None:
    """Compare what the checkpoint has with what the decoder needs.

    Args:
        family, config: of the decoder.
        source: the checkpoint.
        weight_format: which stores some of the matrices; None if all are plain.

    Raises:
        WeightsError: see `check_assemblies`.
    """

    def harmless(name: str) -> bool:
        return is_harmless_extra(name, config) or bool(weight_format and weight_format.explains(name))

    check_assemblies(family.name, family.assemblies(config), source, harmless, weight_format)


def check_assemblies(
    what: str,
    assemblies: Mapping[str, Assembly],
    source: TensorSource,
    harmless: Callable[[str], bool],
    weight_format: WeightFormat | None = None,
) -> None:
    """Compare what a checkpoint has with what some parameters are made of.

    Args:
        what: names the model in the error.
        assemblies: of all parameters.
        source: the checkpoint.
        harmless: of a tensor that no parameter needs, whether the checkpoint may hold it.
        weight_format: which stores some of the matrices; None if all are plain.

    Raises:
        WeightsError: one error for all faults; names the first of them with what was expected and found, and counts
            the rest.
    """
    expected = {
        stored.name: stored
        for name, assembly in assemblies.items()
        for tensor in assembly.sources
        for stored in _in_place_of(name, tensor, source, weight_format)
    }
    present = set(source.names())
    found = [tensor for name, tensor in expected.items() if name in present]
    missing = [f"{name} is missing, expected {list(t.shape)}" for name, t in expected.items() if name not in present]
    misshapen = [
        f"{tensor.name} is {list(source.shape(tensor.name))}, expected {list(tensor.shape)}"
        for tensor in found
        if tuple(source.shape(tensor.name)) != tensor.shape
    ]
    mistyped = [
        f"{tensor.name} is {source.dtype(tensor.name)}, expected {' or '.join(tensor.dtypes)}"
        for tensor in found
        if source.dtype(tensor.name) not in tensor.dtypes
    ]
    extra = [
        f"{name} {list(source.shape(name))} is not expected"
        for name in sorted(present - expected.keys())
        if not harmless(name)
    ]
    faults = {"missing": missing, "misshapen": misshapen, "of another dtype": mistyped, "unexpected": extra}
    count = sum(len(found) for found in faults.values())
    if not count:
        return
    summary = ", ".join(f"{len(found)} {kind}" for kind, found in faults.items() if found)
    # A few of each kind: thousands of missing tensors must not hide the misshapen one that explains them.
    listed = [fault for found in faults.values() for fault in found[:_LISTED]]
    details = "; ".join(listed) + (f"; and {count - len(listed)} more" if count > len(listed) else "")
    raise WeightsError(f"The checkpoint's tensors do not fit its config ({what}; {summary}): {details}.")


def _in_place_of(
    parameter: str, tensor: SourceTensor, source: TensorSource, weight_format: WeightFormat | None
) -> Collection[SourceTensor]:
    """What the checkpoint holds in place of a tensor: itself, unless it is a matrix that is stored otherwise."""
    if weight_format is None or not _is_matrix(tensor):
        return (tensor,)
    stored = weight_format.stored(parameter, tensor, source)
    return (tensor,) if stored is None else stored.values()


def _is_matrix(tensor: SourceTensor) -> bool:
    return len(tensor.shape) == 2 and tensor.name.endswith(".weight")


def assemble(
    family: Family,
    config: ModelConfig,
    source: TensorSource,
    dtype: np.dtype,
    progress: Progress | None = None,
    weight_format: WeightFormat | None = None,
) -> dict[str, Weight]:
    """Make every parameter and put it on the default device.

    Host memory: two parameters and one tensor of the source at most, besides what the source keeps. Packed parameters
    are made from one projection at a time.

    Raises:
        UnsupportedModelError: the model cannot be stored in the weight format.
        WeightsError: tensors are missing, extra or misshapen, cannot be read, overflow float16, or cannot be packed.
    """
    check_tensors(family, config, source, weight_format)
    return assemble_parameters(
        parameter_shapes(config), family.assemblies(config), source, dtype, progress, weight_format
    )


def assemble_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    assemblies: Mapping[str, Assembly],
    source: TensorSource,
    dtype: np.dtype,
    progress: Progress | None = None,
    weight_format: WeightFormat | None = None,
) -> dict[str, Weight]:
    """Make parameters whose sources were checked, in the order of `shapes`, and put them on the default device.

    Args:
        shapes, assemblies: by parameter.
        source: the checkpoint.
        dtype: of what is not packed.
        progress: called after each parameter.
        weight_format: which stores some of the matrices; None if all are plain.

    Raises:
        As `assemble`.
    """
    sizes = {} if weight_format is None else _sizes_of_packed(assemblies, source, weight_format)
    with ThreadPoolExecutor(NUM_THREADS) as pool:

        def fill(name: str, host: np.ndarray) -> None:
            _fill(host, assemblies[name], source, pool)

        def plain(tensor: SourceTensor) -> jax.Array:
            host = aligned_empty(tensor.shape[::-1], dtype)
            _copy(host.T, source.read(tensor.name), tensor.name, pool)
            return jax.device_put(host)

        def pack(name: str) -> Weight:
            assert weight_format is not None  # nothing has a packed size without one
            parts = []
            for tensor in assemblies[name].sources:
                part = _pack_projection(name, tensor, source, weight_format, dtype)
                parts.append(plain(tensor) if part is None else part)
            weight = side_by_side(parts)
            # A head lies [out, in]; packed matrices lie so anyway.
            if isinstance(weight, jax.Array) and not assemblies[name].transpose:
                return weight.T
            return weight

        packed = Packed(sizes, pack)
        return stream_to_device(shapes, dtype, fill, progress, packed)


def _sizes_of_packed(
    assemblies: Mapping[str, Assembly], source: TensorSource, weight_format: WeightFormat
) -> dict[str, int]:
    """Parameters of which a projection is stored in the format -> bytes that the checkpoint has for them."""
    sizes = {}
    for name, assembly in assemblies.items():
        matrices = [tensor for tensor in assembly.sources if _is_matrix(tensor)]
        if any(weight_format.stored(name, matrix, source) is not None for matrix in matrices):
            stored = [tensor for matrix in matrices for tensor in _in_place_of(name, matrix, source, weight_format)]
            sizes[name] = sum(
                math.prod(tensor.shape) * jnp.dtype(source.dtype(tensor.name)).itemsize for tensor in stored
            )
    return sizes


def _pack_projection(
    parameter: str, tensor: SourceTensor, source: TensorSource, weight_format: WeightFormat, dtype: np.dtype
) -> Matrix | None:
    """One projection on the device; None if it is stored as it is."""
    stored = weight_format.stored(parameter, tensor, source)
    if stored is None:
        return None
    try:
        return weight_format.pack(tensor, {role: source.read(each.name) for role, each in stored.items()}, dtype)
    except WeightsError as error:
        raise WeightsError(f"{tensor.name}: {error}") from error


def _fill(host: np.ndarray, assembly: Assembly, source: TensorSource, pool: ThreadPoolExecutor) -> None:
    """Write the sources of one parameter side by side into `host`."""
    start = 0
    for tensor in assembly.sources:
        width = tensor.shape[0] if assembly.transpose else tensor.shape[-1]
        part = host[..., start : start + width]
        _copy(part.T if assembly.transpose else part, source.read(tensor.name), tensor.name, pool)
        start += width


def _copy(out: np.ndarray, array: np.ndarray, name: str, pool: ThreadPoolExecutor) -> None:
    """`out[...] = array` with a cast; `out` may be a transposed view. Rows are split over the threads of `pool`."""
    rows = array.shape[0]
    tile = _TILE_BYTES // max(1, array[0].nbytes)
    if not out.flags.c_contiguous:
        tile = _CACHE_LINE_BYTES // out.itemsize
    tile = max(1, tile)
    # list(): an exception of a thread is raised here.
    list(pool.map(lambda share: _copy_rows(out[share], array[share], name, tile), shares(rows, tile, array.nbytes)))


def _copy_rows(out: np.ndarray, array: np.ndarray, name: str, tile: int) -> None:
    narrowing = out.dtype == np.float16 and array.dtype != np.float16
    for row in range(0, array.shape[0], tile):
        with np.errstate(over="ignore"):
            values = array[row : row + tile].astype(out.dtype, copy=False)
        if narrowing and not np.isfinite(values).all():
            raise WeightsError(f"{name} holds values that float16 cannot; use dtype bfloat16 or float32.")
        _bits(out[row : row + tile])[...] = _bits(values)


def _bits(array: np.ndarray) -> np.ndarray:
    """The same memory as integers where numpy would copy the elements of a foreign dtype one call at a time."""
    return array.view(np.uint16) if array.itemsize == 2 else array
