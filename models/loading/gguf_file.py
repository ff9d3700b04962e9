"""The GGUF container: header, metadata and tensor table of one file (or of all parts of a split one).

The `gguf` package knows the types and the dequantization; its reader, though, makes numpy views for each of the
hundreds of thousands of strings of a vocabulary, which takes seconds. This one walks the header once, checks every
bound, and says in one sentence what is wrong with a file. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from models.errors import UnsupportedModelError, WeightsError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_PART = re.compile(r"^(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table.

    Attributes:
        name: as stored, e.g. `blk.0.attn_q.weight`.
        shape: numpy order (the file stores it reversed); `[out, in]` for a linear weight.
        kind: how the values are stored.
        data: uint8[size_bytes], a view of the mapped file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """uint8[product of all axes but the last, bytes of a row]: the blocks as they are stored."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return self.data.reshape(-1, self.shape[-1] // block * block_bytes)

    def values(self) -> np.ndarray:
        """float32[shape], dequantized; for F32 a read-only view of the file.

        Only for types that the `gguf` package can dequantize: `models.loading.gguf.SUPPORTED_KINDS` is checked before.
        """
        # In rows, because the package works on a few rows at a time: a flat array would make temporaries as large.
        return np.asarray(dequantize(self.rows, self.kind), dtype=np.float32).reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says: metadata by key (scalars, strings, lists) and tensors by stored name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """A position in the mapped header; every read checks that the bytes are there."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.data = data
        self.offset = 0

    def take(self, size: int) -> memoryview:
        """The next `size` bytes."""
        end = self.offset + size
        if end > len(self.data):
            raise WeightsError(
                f"{self.path} is truncated: its header needs at least {end} bytes, the file has {len(self.data)}."
            )
        view = self.data[self.offset : end]
        self.offset = end
        return view

    def number(self, code: str) -> Any:
        """One little-endian scalar of struct format `code`."""
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        """A length-prefixed UTF-8 string."""
        raw = bytes(self.take(self.number("<Q")))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise WeightsError(f"{self.path} is corrupt: a string before byte {self.offset} is not UTF-8.") from error

    def kind(self) -> GGUFValueType:
        """The type tag of a metadata value."""
        tag = self.number("<I")
        try:
            return GGUFValueType(tag)
        except ValueError as error:
            raise WeightsError(
                f"{self.path} is corrupt: unknown metadata type {tag} at byte {self.offset - 4}."
            ) from error

    def value(self, kind: GGUFValueType) -> Any:
        """One metadata value: a number, a bool, a string, or a list of them."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind is GGUFValueType.STRING:
            return self.string()
        item, count = self.kind(), self.number("<Q")
        if item in _SCALARS:
            code = _SCALARS[item]
            return np.frombuffer(self.take(count * struct.calcsize(code)), dtype=code).tolist()
        if item is GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        raise WeightsError(f"{self.path} is corrupt: a nested list in the metadata at byte {self.offset}.")


def _read_header(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; returns the numbers of tensors and of metadata entries."""
    if bytes(cursor.take(4)) != _MAGIC:
        raise WeightsError(f"{cursor.path} is not a GGUF file: it does not begin with the bytes 'GGUF'.")
    version = cursor.number("<I")
    if version not in _VERSIONS:
        big_endian = version & 0xFFFF == 0
        found = "a big-endian file" if big_endian else f"version {version}"
        raise UnsupportedModelError(f"{cursor.path} is {found}; supported: little-endian GGUF of version 2 or 3.")
    return cursor.number("<Q"), cursor.number("<Q")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in metadata:
            raise WeightsError(f"{cursor.path} is corrupt: metadata key {key!r} appears twice.")
        metadata[key] = cursor.value(cursor.kind())
    return metadata


def _read_tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Name, shape (numpy order), storage type and offset of one tensor."""
    name = cursor.string()
    num_dims = cursor.number("<I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise WeightsError(
            f"{cursor.path} is corrupt: tensor {name!r} has {num_dims} dimensions, possible are 1 to {_MAX_DIMS}."
        )
    shape = tuple(reversed([cursor.number("<Q") for _ in range(num_dims)]))
    if 0 in shape:
        raise WeightsError(f"{cursor.path} is corrupt: tensor {name!r} has the empty shape {shape}.")
    tag = cursor.number("<I")
    try:
        kind = GGMLQuantizationType(tag)
    except ValueError as error:
        raise UnsupportedModelError(f"Tensor {name!r} of {cursor.path} has the unknown storage type {tag}.") from error
    return name, shape, kind, cursor.number("<Q")


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise WeightsError(f"{path} is corrupt: general.alignment must be a power of two, found {alignment!r}.")
    return alignment


def _size_bytes(path: Path, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise WeightsError(
            f"{path} is corrupt: rows of {shape[-1]} in tensor {name!r} are no multiple of {block} ({kind.name})."
        )
    return math.prod(shape) // block * block_bytes


def _read_part(path: Path) -> GgufFile:
    """Read one file."""
    try:
        if path.stat().st_size == 0:
            raise WeightsError(f"{path} is not a GGUF file: it is empty.")
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    cursor = _Cursor(path, memoryview(data))
    num_tensors, num_entries = _read_header(cursor)
    metadata = _read_metadata(cursor, num_entries)
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = _alignment(path, metadata)
    start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        size = _size_bytes(path, name, shape, kind)
        end = start + offset + size
        if end > len(data):
            raise WeightsError(f"{path} is truncated: tensor {name!r} ends at byte {end}, the file has {len(data)}.")
        if name in tensors:
            raise WeightsError(f"{path} is corrupt: tensor {name!r} appears twice.")
        tensors[name] = GgufTensor(name, shape, kind, data[start + offset : end])
    return GgufFile(path, metadata, tensors)


def part_paths(path: Path) -> list[Path]:
    """All parts of the model that `path` belongs to: `[path]`, or the files `…-00001-of-0000N.gguf` to N."""
    match = _PART.match(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['stem']}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)]


def read_gguf(path: Path | str) -> GgufFile:
    """Read header, metadata and tensor table; tensor data stay on disk until they are read.

    Args:
        path: a `.gguf` file; any part of a split model stands for all of them.

    Raises:
        WeightsError: the file (or a part) is missing, truncated or corrupt.
        UnsupportedModelError: its version, byte order or a storage type is unknown.
    """
    parts = part_paths(Path(path))
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise WeightsError(f"{path} is incomplete: {', '.join(missing)} missing of {len(parts)} file(s).")
    first, *rest = [_read_part(part) for part in parts]
    tensors = dict(first.tensors)
    for part in rest:
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise WeightsError(f"{part.path} is corrupt: tensor {min(twice)!r} is also in another part.")
        tensors |= part.tensors
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise WeightsError(
            f"{path} is incomplete: {expected} tensors announced, {len(tensors)} found in {len(parts)} file(s)."
        )
    return GgufFile(first.path, first.metadata, tensors)
