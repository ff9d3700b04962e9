"""Ends without a word while it builds, as a crash of a compiler would."""

import os

from engine.remote import worker
from tests.engine.remote.workers.common import serve

if __name__ == "__main__":
    worker.build_engine = lambda config: os._exit(3)  # type: ignore[assignment]
    serve()
