"""Engines that tests share: each distinct configuration is built once per run, and after a test it must be idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from tests.engine.helpers import SMALL, TINY, core_of, require_idle

MakeEngine = Callable[..., Engine]


MOST_ENGINES = 6  # each holds some 2,500 memory mappings, of which Linux grants a process 65,530


class EngineShelf:
    """Builds engines on demand and keeps those used last."""

    def __init__(self, cache_dir: str) -> None:
        self.cache_dir = cache_dir
        self._engines: dict[tuple[Any, ...], Engine] = {}

    def take(self, model: str = "llama", **settings: Any) -> Engine:
        """The engine of a tiny golden model with `SMALL` settings, changed by `settings`."""
        key = (model, *sorted(settings.items()))
        engine = self._engines.pop(key, None)
        if engine is None:
            every = {**SMALL, "compilation_cache_dir": self.cache_dir, **settings}
            engine = Engine(str(TINY / model), **every)
        self._engines[key] = engine  # the last in order is the one used last
        if len(self._engines) > MOST_ENGINES:
            del self._engines[next(iter(self._engines))]
        return engine

    def require_idle(self) -> None:
        """Prove that no test left a request behind; forgets the engine that fails, so that others are not blamed."""
        for key, engine in list(self._engines.items()):
            try:
                require_idle(core_of(engine))
            except AssertionError:
                del self._engines[key]
                raise


@pytest.fixture(scope="session")
def compilation_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where executables are kept between runs of the tests (`.pytest_cache/d/quire-xla`)."""
    cache = request.config.cache if request.config.pluginmanager.hasplugin("cacheprovider") else None
    return str(tmp_path_factory.mktemp("xla") if cache is None else cache.mkdir("quire-xla"))


@pytest.fixture(scope="session")
def shelf(compilation_cache: str) -> EngineShelf:
    """All engines of the run."""
    return EngineShelf(compilation_cache)


@pytest.fixture(scope="session")
def head_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where random heads are written, once per run."""
    return tmp_path_factory.mktemp("heads")


@pytest.fixture
def make_engine(shelf: EngineShelf) -> Iterator[MakeEngine]:
    """A shared engine of a tiny golden model, by its name and settings. Afterwards it must be idle."""
    yield shelf.take
    shelf.require_idle()


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    """The engine that most tests use: llama, four sequences, with its tokenizer."""
    return make_engine()
