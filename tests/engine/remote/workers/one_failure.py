"""The seventh step raises."""

from tests.engine.remote.workers.common import fail_dispatch_if, serve

if __name__ == "__main__":
    fail_dispatch_if(lambda number: number == 6)
    serve()
