"""A bundle's files: whose they are, whether they are whole, and arrays and executables in them."""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import serialize_executable

from engine.bundle.manifest import ArrayEntry
from engine.errors import BundleError
from engine.runtime.filling import Compiled
from models.functional import Params

ALIGNMENT = 64  # bytes; XLA on a CPU uses a buffer that is aligned so where it lies
_FAST = 1  # of zlib: executables become five times smaller, and are read five times a day


def require_trusted(directory: Path, trusted: bool) -> None:
    """Refuse files that another user could have put there: they hold machine code and pickles.

    Args:
        trusted: the user says that they may be loaded all the same.

    Raises:
        BundleError: says which file, and what to do.
    """
    if trusted:
        return
    for path in (directory, *sorted(directory.rglob("*"))):
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode):
            reason = "is a link"
        elif found.st_uid != os.getuid():
            reason = f"belongs to user {found.st_uid}, not to you ({os.getuid()})"
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            reason = "can be written by others"
        else:
            continue
        raise BundleError(
            f"{path} {reason}. A bundle is machine code that runs with your rights: take one that you made yourself, "
            "or set trust_bundle if you know who made it."
        )


def digest_of(file: Path) -> str:
    """sha256."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_checked(directory: Path, name: str, digests: Mapping[str, str]) -> bytes:
    """A file's content.

    Raises:
        BundleError: it is not there, or not what was written.
    """
    try:
        content = (directory / name).read_bytes()
    except OSError as error:
        raise BundleError(f"{directory / name} cannot be read: {error.strerror or error}.") from error
    if hashlib.sha256(content).hexdigest() != digests.get(name):
        raise BundleError(f"{directory / name} is damaged: its digest is another. Make the bundle anew.")
    return content


def pack_executable(compiled: Any) -> bytes:
    """A compiled function as bytes."""
    return zlib.compress(pickle.dumps(serialize_executable.serialize(compiled)), _FAST)


def unpack_executable(content: bytes) -> Compiled:
    """The inverse. Runs what is in there: only for content that was checked and is trusted."""
    payload, in_tree, out_tree = pickle.loads(zlib.decompress(content))
    device = jax.devices()[0]
    return serialize_executable.deserialize_and_load(payload, in_tree, out_tree, execution_devices=[device])


def write_arrays(file: Path, params: Params) -> tuple[list[ArrayEntry], bytes]:
    """Write the arrays of parameters as the device holds them.

    Returns:
        Where each lies, and the tree that they are leaves of, as bytes.
    """
    leaves, tree = jax.tree.flatten(params)
    entries = []
    with file.open("wb") as out:
        for leaf in leaves:
            host = np.ascontiguousarray(np.asarray(leaf))
            out.write(bytes(-out.tell() % ALIGNMENT))
            entries.append(ArrayEntry(out.tell(), list(host.shape), str(host.dtype)))
            out.write(host.reshape(-1).view(np.uint8).data)
    return entries, pickle.dumps(tree)


def map_arrays(file: Path, entries: list[ArrayEntry], tree: bytes) -> Params:
    """Parameters on the device. On a CPU they stay in the mapped file: pages are read as they are used, and processes
    share them.

    Raises:
        BundleError: the file cannot be read, or is too short.
    """
    try:
        mapped = np.asarray(np.memmap(file, np.uint8, "r"))
        leaves = [jax.device_put(_view(mapped, entry)) for entry in entries]
    except (OSError, ValueError) as error:
        raise BundleError(f"{file} cannot be read: {error}.") from error
    return jax.block_until_ready(jax.tree.unflatten(pickle.loads(tree), leaves))


def _view(mapped: np.ndarray, entry: ArrayEntry) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, entry.dtype, entry.dtype))
    size = int(np.prod(entry.shape)) * dtype.itemsize
    return mapped[entry.offset : entry.offset + size].view(dtype).reshape(entry.shape)
