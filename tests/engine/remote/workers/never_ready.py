"""Builds for ever."""

import time

from engine.remote import worker
from tests.engine.remote.workers.common import serve

if __name__ == "__main__":
    worker.build_engine = lambda config: time.sleep(3600)  # type: ignore[assignment]
    serve()
