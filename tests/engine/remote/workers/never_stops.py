"""Does not stop when it is told to."""

from engine.driver import Driver
from tests.engine.remote.workers.common import serve

if __name__ == "__main__":
    Driver.stop = lambda driver: None  # type: ignore[method-assign]
    serve()
