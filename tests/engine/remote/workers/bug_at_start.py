"""Fails while it builds with something that nobody foresaw."""

from engine.config import EngineConfig
from engine.remote import worker
from tests.engine.remote.workers.common import serve


def fail(config: EngineConfig) -> None:
    """The bug."""
    raise ZeroDivisionError("no device")


if __name__ == "__main__":
    worker.build_engine = fail  # type: ignore[assignment]
    serve()
