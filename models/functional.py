"""Between modules and flat arrays: the only file that splits and merges NNX modules.

Layers are written as `nnx.Module`s; what runs are pure functions of a flat dict `name -> weight`, an array or a packed
matrix of two or three. Passing NNX state through `jit` costs milliseconds per call, a flat dict microseconds; and names
as in `models.parameters` are what checkpoints are loaded under.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from flax import nnx

from models.layers.product import Weight

Params = dict[str, Weight]


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


class FunctionalModel[M: nnx.Module]:
    """A module's structure without its arrays.

    Args:
        build: makes the module; it is only traced, so no array of it ever exists.
        lazy: trace it when it is first asked for, outside of any trace: executables that are only read never ask.
    """

    def __init__(self, build: Callable[[], M], *, lazy: bool = False) -> None:
        self._build = build
        self._lock = threading.Lock()
        self._parts: tuple[Any, Any] | None = None
        if not lazy:
            self._split()

    def _split(self) -> tuple[Any, Any]:
        """Graph and state."""
        with self._lock:
            if self._parts is None:
                self._parts = nnx.split(nnx.eval_shape(self._build))
            return self._parts

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of each parameter, as if nothing were packed."""
        return {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(self._split()[1])}

    def bind(self, params: Mapping[str, Weight]) -> M:
        """The module with these weights. Call inside a traced function.

        Raises:
            KeyError: a parameter is missing.
        """
        graph, state = self._split()
        flat = [(path, leaf.replace(params[_name(path)])) for path, leaf in nnx.to_flat_state(state)]
        return nnx.merge(graph, nnx.from_flat_state(flat))


@partial(jax.jit, static_argnums=0)
def _run(graph: Any, state: Any, *args: Any) -> Any:
    return nnx.merge(graph, state)(*args)


def call_shared(module: nnx.Module, *args: Any) -> Any:
    """Call a module inside an inner `jit` keyed on its structure, so that equal layers are traced and lowered once.

    32 unrolled layers lower ten times faster this way (architecture: unrolled layers, shared trace); XLA inlines the
    calls.
    """
    graph, state = nnx.split(module)
    return _run(graph, state, *args)
