"""Faults that only the command line can meet, and the exit code of each fault."""

from __future__ import annotations

from engine.errors import EngineDeadError, QuireError, RequestFailedError

EXIT_OK = 0
EXIT_FAILED = 1  # not the user's fault: a request or the engine failed, a measurement is not valid, a replay differs
EXIT_USAGE = 2  # the user's fault: a flag, a prompt, a model, a file; also what argparse exits with
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class UsageError(QuireError, ValueError):
    """The command line contradicts itself, or a file that it names cannot be used."""


class MeasurementError(QuireError, RuntimeError):
    """A benchmark did other work than it was asked to do, so its figures mean nothing."""


def exit_code(error: QuireError) -> int:
    """The exit code for an error that ends the program."""
    failed = isinstance(error, (RequestFailedError, EngineDeadError, MeasurementError))
    return EXIT_FAILED if failed else EXIT_USAGE
