"""Safetensors checkpoints, one file or many, as a `TensorSource` over memory-mapped files.

    file:   u64 little-endian header size │ JSON header │ data
    header: {"name": {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, …}, offsets into the data

(format: the `safetensors` project's README). Headers are read and checked when the checkpoint is opened, so that a
truncated download fails at once and by name; data are mapped on the first read. The `safetensors` package is not used
here: its numpy reader copies each tensor, and its errors name no file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from models.errors import ModelNotFoundError, WeightsError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "C64": np.dtype("<c8"),
}


@dataclass(frozen=True)
class _Entry:
    """Where one tensor is: `begin` counts bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size_bytes: int


class SafetensorsSource:
    """The tensors of one checkpoint. Keeps one mapping per file; they are closed with the object."""

    def __init__(self, entries: Mapping[str, _Entry]) -> None:
        self._entries = entries
        self._mappings: dict[Path, np.memmap] = {}

    def names(self) -> Collection[str]:
        """Every tensor of all files."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of one tensor, from the header."""
        return _DTYPES[self._entries[name].dtype].name

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file.

        Raises:
            WeightsError: the file disappeared or shrank since it was opened.
        """
        entry = self._entries[name]
        raw = self._mapped(entry.file)[entry.begin : entry.begin + entry.size_bytes]
        if raw.size != entry.size_bytes:
            raise WeightsError(f"{entry.file}: the file became shorter while it was read.")
        return raw.view(_DTYPES[entry.dtype]).reshape(entry.shape)

    def _mapped(self, file: Path) -> np.ndarray:
        if file not in self._mappings:
            try:
                self._mappings[file] = np.memmap(file, dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise WeightsError(f"{file}: cannot be read: {error}.") from error
        return self._mappings[file]


def open_safetensors(directory: Path) -> SafetensorsSource:
    """Open a checkpoint: `model.safetensors`, or the files of the index, or all `*.safetensors` there are.

    Raises:
        ModelNotFoundError: the directory has none.
        WeightsError: a file is missing, truncated or corrupted, or two files hold the same tensor.
    """
    if (directory / SINGLE_NAME).is_file():
        return SafetensorsSource(read_header(directory / SINGLE_NAME))
    if (directory / INDEX_NAME).is_file():
        return _open_sharded(directory)
    # Mistral's own files, consolidated*.safetensors, hold the same weights again under other names.
    files = sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if not files:
        others = sorted({f"*{file.suffix}" for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth")})
        hint = f" ({', '.join(others)} cannot be read: convert them to safetensors)" if others else ""
        raise ModelNotFoundError(f"{directory} has no *.safetensors file{hint}.")
    return SafetensorsSource(_merge(files))


def has_safetensors(directory: Path) -> bool:
    """True if `open_safetensors` would find a file (or the index of some)."""
    return (directory / INDEX_NAME).is_file() or any(directory.glob("*.safetensors"))


def _open_sharded(directory: Path) -> SafetensorsSource:
    index = directory / INDEX_NAME
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = {str(name): directory / str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: not an index of safetensors files: {type(error).__name__}: {error}.") from error
    files = sorted(set(shards.values()))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise WeightsError(f"{index} names {len(files)} files, of which {len(missing)} are missing: {_some(missing)}.")
    entries = _merge(files)
    misplaced = [name for name, file in shards.items() if name not in entries or entries[name].file != file]
    if misplaced:
        raise WeightsError(
            f"{index}: {len(misplaced)} tensors are not in the file that the index names: {_some(misplaced)}."
        )
    return SafetensorsSource(entries)


def _merge(files: list[Path]) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise WeightsError(f"{name} is in both {entries[name].file} and {file}.")
            entries[name] = entry
    return entries


def read_header(file: Path) -> dict[str, _Entry]:
    """Read and check one file's header.

    Raises:
        WeightsError: the file is truncated or corrupted; says how.
    """
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if file_bytes < 8 or header_bytes > file_bytes - 8:
                raise WeightsError(
                    f"{file} is truncated or not a safetensors file: it has {file_bytes} bytes, its header alone "
                    f"would need {header_bytes + 8}."
                )
            if header_bytes > _MAX_HEADER_BYTES:
                raise WeightsError(f"{file} is corrupted: its header would be {header_bytes} bytes long.")
            header = json.loads(stream.read(header_bytes))
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read: {error}.") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise _as_weights_error(file, error) from error
    if not isinstance(header, dict):
        raise WeightsError(f"{file} is corrupted: its header is not a JSON object.")
    tensors = {name: value for name, value in header.items() if name != "__metadata__"}
    entries = {name: _parse_entry(file, name, value, 8 + header_bytes) for name, value in tensors.items()}
    _check_extent(file, entries, 8 + header_bytes, file_bytes)
    return entries


def _as_weights_error(file: Path, error: ValueError) -> WeightsError:
    return (
        error
        if isinstance(error, WeightsError)
        else WeightsError(f"{file} is corrupted: its header is not JSON: {error}.")
    )


def _parse_entry(file: Path, name: str, value: Any, data_start: int) -> _Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(f"{file} is corrupted: the header's entry for {name} is not readable.") from error
    if not sound:
        raise WeightsError(f"{file} is corrupted: the header's entry for {name} has impossible values.")
    if dtype not in _DTYPES:
        raise WeightsError(f"{file}: {name} has the unknown dtype {dtype!r}; known are {', '.join(_DTYPES)}.")
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != needed:
        raise WeightsError(
            f"{file} is corrupted: {name} of shape {list(shape)} and dtype {dtype} needs "
            f"{needed} bytes, the header gives it {end - begin}."
        )
    return _Entry(file, dtype, shape, data_start + begin, end - begin)


def _check_extent(file: Path, entries: Mapping[str, _Entry], data_start: int, file_bytes: int) -> None:
    """The tensors must tile the data part: no hole, no overlap, and the file ends where the last of them ends."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].size_bytes)):
        if entry.begin != position:
            raise WeightsError(
                f"{file} is corrupted: {name} starts at byte {entry.begin}, the one before ends at {position}."
            )
        position += entry.size_bytes
    if file_bytes < position:
        raise WeightsError(f"{file} is truncated: it has {file_bytes} bytes, its header promises {position}.")
    if file_bytes > position:
        raise WeightsError(f"{file} is corrupted: {file_bytes - position} bytes follow the last tensor.")


def _some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
