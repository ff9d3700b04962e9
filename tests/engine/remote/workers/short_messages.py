"""Messages may have a few hundred bytes only; an output with log-probabilities has more."""

from engine.remote import wire
from tests.engine.remote.workers.common import serve

if __name__ == "__main__":
    wire.MOST_MESSAGE_BYTES = 3000
    serve()
