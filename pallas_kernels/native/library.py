"""Compiles, keeps, loads and registers the library of native kernels."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax

logger = logging.getLogger("quire.kernels")

SOURCES = Path(__file__).parent
MAIN = ("attention.cc", "dense.cc", "integers.cc", "kv_write.cc", "product.cc", "rowwise.cc")
TARGETS = {  # name for XLA -> symbol
    "quire_dense_product": "quire_dense_product",
    "quire_integer_product": "quire_integer_product",
    "quire_packed_product": "quire_packed_product",
    "quire_paged_attention": "quire_paged_attention",
    "quire_rms_norm": "quire_rms_norm",
    "quire_gate": "quire_gate",
    "quire_kv_write": "quire_kv_write",
    "quire_turns": "quire_turns",
    "quire_heads": "quire_heads",
}
COMPILERS = ("c++", "g++", "clang++")  # in the order in which "auto" looks for them
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
COMPILE_S = 120.0


@dataclass(frozen=True)
class Settings:
    """How the library is made.

    Attributes:
        cache_dir: where compiled libraries are kept; None = nowhere, each process compiles its own.
        compiler: a C++ compiler's name or path; "auto" = the first of `COMPILERS` that is there; "" = none.
        machine: the flag that names the instructions to use.
    """

    cache_dir: Path | None = None
    compiler: str = "auto"
    machine: str = "-march=native"


@dataclass(frozen=True)
class Library:
    """What came of it: one that is loaded and registered, or the reason why there is none.

    Attributes:
        unavailable: the reason.
        bfloat16_dots: whether it multiplies bfloat16; if not, activations must come as float32.
        integer_dots: whether it multiplies 8-bit integers.
    """

    unavailable: str | None = None
    bfloat16_dots: bool = False
    integer_dots: bool = False


class BuildError(RuntimeError):
    """The library cannot be made or loaded; the message says why."""


_lock = threading.Lock()
_settings = Settings()
_library: Library | None = None


def configure(cache_dir: Path | None = None, compiler: str = "auto") -> None:
    """Say how the library is made. A library that is loaded stays: XLA's executables hold its functions. A failure is
    forgotten if the settings differ.
    """
    global _settings, _library
    with _lock:
        wanted = Settings(cache_dir, compiler)
        if wanted != _settings and (_library is None or _library.unavailable is not None):
            _library = None
        _settings = wanted


def unavailable() -> str | None:
    """None, or the reason why there are no native kernels. The first call compiles them, unless the cache has them.

    An empty compiler says no even after a library was loaded, for what is traced from then on.
    """
    if not _settings.compiler:
        return "no C++ compiler is configured"
    return _loaded().unavailable


def has_bfloat16_dots() -> bool:
    """Whether kernels take bfloat16 activations; otherwise they must come as float32."""
    return _loaded().bfloat16_dots


def has_integer_dots() -> bool:
    """Whether there is a product of 8-bit integers on both sides."""
    return _loaded().integer_dots


def _loaded() -> Library:
    global _library
    with _lock:
        if _library is None:
            try:
                loaded = load(_settings)
            except BuildError as error:
                logger.warning("no native kernels: %s", error)
                _library = Library(unavailable=str(error))
            else:
                for name, symbol in TARGETS.items():
                    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, symbol)), platform="cpu")
                _library = Library(
                    bfloat16_dots=bool(loaded.quire_dots_of_bfloat16()),
                    integer_dots=bool(loaded.quire_dots_of_integers()),
                )
        return _library


def load(settings: Settings) -> ctypes.CDLL:
    """The library, from the cache or compiled.

    Raises:
        BuildError: there is no compiler, it fails, or what it made cannot be loaded.
    """
    compiler = _find(settings.compiler)
    if settings.cache_dir is None:
        return _make(compiler, settings.machine, None)
    path = settings.cache_dir / f"{_key(compiler, settings.machine)}.so"
    try:
        if path.exists():
            kept = path.read_bytes()
            if _digest_path(path).read_text() == hashlib.sha256(kept).hexdigest():
                return ctypes.CDLL(str(path))
            logger.warning("%s is damaged: compiling it anew", path)
    except OSError as error:
        logger.warning("%s cannot be used (%s): compiling it anew", path, error)
    return _make(compiler, settings.machine, path)


def _find(name: str) -> str:
    candidates = COMPILERS if name == "auto" else (name,)
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None:
        raise BuildError(f"no C++ compiler ({' or '.join(candidates)}) is installed")
    return found


def _key(compiler: str, machine: str) -> str:
    """Of everything that the result depends on: sources, XLA's headers, flags; the compiler and the processor's
    instructions by the macros that the one defines for the other.
    """
    parts = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cc", ".h")]
    macros = _run([compiler, machine, "-dM", "-E", "-x", "c++", os.devnull])
    parts += [version("jaxlib").encode(), " ".join((compiler, machine, *FLAGS)).encode(), macros.encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def _make(compiler: str, machine: str, kept_at: Path | None) -> ctypes.CDLL:
    """Compile and load; keep the result if there is a place for it. Whoever reads there sees all of a file or none."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="quire-native-") as folder:
        made = Path(folder) / "native.so"
        sources = [str(SOURCES / name) for name in MAIN]
        headers = ("-isystem", jax.ffi.include_dir())
        _run([compiler, machine, *FLAGS, *headers, "-o", str(made), *sources])
        logger.info("compiled native kernels in %.1f s", time.monotonic() - started)
        if kept_at is not None:
            try:
                _keep(made, kept_at)
            except OSError as error:
                logger.warning("native kernels cannot be kept at %s: %s", kept_at, error)
        try:
            return ctypes.CDLL(str(made))  # which outlives its file
        except OSError as error:
            raise BuildError(f"the compiled kernels cannot be loaded: {error}") from error


def _keep(made: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = made.read_bytes()
    for target, data in ((path, content), (_digest_path(path), hashlib.sha256(content).hexdigest().encode())):
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, target)


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if result.returncode:
        raise BuildError(f"{command[0]} ends with exit status {result.returncode}: {result.stderr.strip()[-500:]}")
    return result.stdout
