"""Steps take so long that no request ends before a test has done something to it."""

import time

from tests.engine.remote.workers.common import before_each_step, serve

if __name__ == "__main__":
    before_each_step(lambda: time.sleep(0.02))
    serve()
