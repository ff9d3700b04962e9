"""Compiling on purpose in a process that holds a ready engine, without the engine's warning about it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def expected_compiles() -> Iterator[None]:
    """Inside, the engine does not report compilations as shapes that escaped their buckets."""
    logger = logging.getLogger("quire.compile")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
