"""How functions are lowered, where JAX keeps what it compiled, and a count of what compiles when nothing must."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from engine.config import CompileConfig
from engine.errors import CacheWriteError

logger = logging.getLogger("quire.compile")
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class _OfThread(threading.local):
    """Whether this thread compiles what was planned."""

    expects = False


class CompileCounter:
    """Counts XLA compilations of this process outside of `building` blocks, and of threads that compile what was
    planned: once an engine is ready they are defects.
    """

    def __init__(self) -> None:
        self.after_ready = 0
        self._num_building = 0
        self._thread = _OfThread()
        monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILE_EVENT and self._num_building == 0 and not self._thread.expects:
            self.after_ready += 1
            logger.warning("compiled for %.2f s after the engine was ready: a shape escaped its bucket", duration_secs)

    @contextmanager
    def building(self) -> Iterator[None]:
        """An engine is being built: compilations are expected."""
        self._num_building += 1
        try:
            yield
        finally:
            self._num_building -= 1

    @contextmanager
    def expected(self) -> Iterator[None]:
        """This thread, and no other, compiles what was planned, whether the engine serves already or not. (JAX tells of
        a compilation in the thread that waits for it.)
        """
        self._thread.expects = True
        try:
            yield
        finally:
            self._thread.expects = False


COUNTER = CompileCounter()


def enable_persistent_cache(config: CompileConfig, default: Path) -> Path | None:
    """Point JAX's compilation cache at its directory, and keep even fast compilations: a start has dozens of them.

    Raises:
        CacheWriteError: the directory cannot be made.
    """
    path = None if config.compilation_cache_dir == "" else Path(config.compilation_cache_dir or default).expanduser()
    try:
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheWriteError(
            f"compilation_cache_dir={path} cannot be made: {error.strerror}. "
            "Name a directory that can be written, or '' for no cache."
        ) from error
    wanted = None if path is None else str(path)
    if jax.config.jax_compilation_cache_dir != wanted:
        jax.config.update("jax_compilation_cache_dir", wanted)
        compilation_cache.reset_cache()  # JAX reads the directory at the first compilation and not again
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def lower(jitted: Any, *args: Any, donate: tuple[str, ...] = (), **static: Any) -> Any:
    """Trace and lower a jitted function under a function object of its own.

    JAX's caches keep an executable for as long as the function that it was compiled from lives: under the function of
    the module that is for ever, and on a CPU each takes some fifty memory mappings, of which Linux grants a process
    65,530. This one goes with its engine.

    Args:
        jitted: by `jax.jit`.
        args: shapes and dtypes.
        donate: names of arguments, as `jitted` has them.
        static: arguments that are fixed.
    """
    function = jitted.__wrapped__
    alone = update_wrapper(partial(function, **static), function)
    del alone.__wrapped__  # its signature is without the static arguments
    return jax.jit(alone, donate_argnames=donate).lower(*args)


def shapes_of(tree: Any) -> Any:
    """Shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
