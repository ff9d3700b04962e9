"""Messages between the two processes: typed structs in msgpack, each behind its length.

Both sides are the same version of this code, one started by the other, so that there is no version to negotiate.
Structs are arrays on the wire; their tag is the first entry.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from engine import errors
from engine.errors import InvalidRequestError, QuireError, RequestFailedError

MOST_MESSAGE_BYTES = 64 * 2**20  # a longer one is refused by who would send it
_LENGTH = struct.Struct("<I")

# (token id, logprob, rank, text) per candidate of one position
Position = list[tuple[int, float, int | None, str | None]]


class WireError(msgspec.Struct, array_like=True):
    """An exception. Attributes: kind: name of its type in `engine.errors`; the others as in `InvalidRequestError`."""

    kind: str
    message: str
    parameter: str | None = None
    code: str | None = None


# to the worker


class Start(msgspec.Struct, array_like=True, tag=0):
    """The first message. Attributes: settings: flat, as `EngineConfig.from_flat` takes them; log_level: of "quire"."""

    settings: dict[str, Any]
    log_level: int


class Add(msgspec.Struct, array_like=True, tag=1):
    """A request. Attributes: handle: what the worker calls it in its answers; request: see `plain`."""

    handle: int
    request: dict[str, Any]


class Abort(msgspec.Struct, array_like=True, tag=2):
    """End a request."""

    request_id: str


class Ask(msgspec.Struct, array_like=True, tag=3):
    """Anything that has one answer. Attributes: number: comes back with the answer; what: a name in the worker's table;
    arguments: for it.
    """

    number: int
    what: str
    arguments: list[Any]


class Stop(msgspec.Struct, array_like=True, tag=4):
    """End the process after the step that runs now."""


# from the worker


class Ready(msgspec.Struct, array_like=True, tag=10):
    """The engine is built. Attributes: info: `EngineInfo` as plain values; tokenizer_path: where the worker's own came
    from; None if it has none.
    """

    info: dict[str, Any]
    tokenizer_path: str | None


class Failed(msgspec.Struct, array_like=True, tag=11):
    """The last message of a worker that could not start, or cannot go on."""

    error: WireError


class Completion(msgspec.Struct, array_like=True):
    """What is new of one of n completions. Attributes as in `CompletionOutput`."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: list[Position] | None
    finish_reason: str | None
    stop_reason: int | str | None


class Output(msgspec.Struct, array_like=True):
    """What is new of one request.

    Attributes:
        handle: of the request.
        completions: all n.
        finished, num_cached_tokens, error, embedding: as in `RequestOutput`.
        prompt_logprobs: all of them if there are more than the last time; else None.
        metrics: fields of `RequestMetrics` in their order; only with the last output.
    """

    handle: int
    completions: list[Completion]
    finished: bool
    num_cached_tokens: int
    prompt_logprobs: list[Position | None] | None
    metrics: list[int | float | tuple[int, ...] | None] | None
    error: str | None
    embedding: tuple[float, ...] | None = None


class Step(msgspec.Struct, array_like=True, tag=12):
    """Everything that one step gave.

    Attributes:
        tokens: (handle, token ids, text) of each request of which nothing else is new: nearly all of them.
        outputs: of the others.
        refused: (handle, why) of requests that did not get into the queue.
    """

    tokens: list[tuple[int, tuple[int, ...], str]]
    outputs: list[Output]
    refused: list[tuple[int, WireError]]


class Answer(msgspec.Struct, array_like=True, tag=13):
    """To an `Ask`."""

    number: int
    value: Any


class Refusal(msgspec.Struct, array_like=True, tag=14):
    """The other answer to an `Ask`."""

    number: int
    error: WireError


ToWorker = Start | Add | Abort | Ask | Stop
FromWorker = Ready | Failed | Step | Answer | Refusal

_ENCODER = msgspec.msgpack.Encoder()
to_worker_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
from_worker_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


class MessageTooLongError(Exception):
    """A message exceeds `MOST_MESSAGE_BYTES`."""


def frame(message: ToWorker | FromWorker) -> bytearray:
    """A message as it goes over the wire: uint32 length, little-endian, and msgpack.

    Raises:
        MessageTooLongError: it is longer than the other side would read.
    """
    buffer = bytearray(_LENGTH.size)
    _ENCODER.encode_into(message, buffer, _LENGTH.size)
    length = len(buffer) - _LENGTH.size
    _check(length)
    _LENGTH.pack_into(buffer, 0, length)
    return buffer


class Frames:
    """Cuts messages out of a stream of bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """The messages that `data` completes, as msgpack. To be read to the end before the next call.

        Raises:
            MessageTooLongError: a length that no message of ours has.
        """
        self._buffer += data
        start, stop = 0, len(self._buffer)
        while stop - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            _check(length)
            end = start + _LENGTH.size + length
            if end > stop:
                break
            yield bytes(memoryview(self._buffer)[start + _LENGTH.size : end])
            start = end
        del self._buffer[:start]


def _check(length: int) -> None:
    if length > MOST_MESSAGE_BYTES:
        raise MessageTooLongError(f"{length} bytes; a message may have {MOST_MESSAGE_BYTES}")


def error_to_wire(error: Exception) -> WireError:
    """An exception as plain values; one that is not ours becomes a `RequestFailedError` that names it."""
    if not isinstance(error, QuireError) or type(error).__name__ not in errors.__all__:
        return WireError(RequestFailedError.__name__, f"{type(error).__name__}: {error}")
    if isinstance(error, InvalidRequestError):
        return WireError(type(error).__name__, str(error), error.parameter, error.code)
    return WireError(type(error).__name__, str(error))


def error_from_wire(error: WireError) -> QuireError:
    """The exception again: same type, same message."""
    kind = getattr(errors, error.kind)
    if kind is InvalidRequestError:
        return InvalidRequestError(error.message, error.parameter, error.code)
    return kind(error.message)
