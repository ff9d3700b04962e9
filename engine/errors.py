"""Every fault that a user can cause or meet, as one type each.

The border (`Engine`, `AsyncEngine`, the server) raises these and nothing else for a user's fault; each message says
what was wrong and what is allowed. `serving` maps the types to HTTP statuses in one table.
"""

from __future__ import annotations

from models.errors import CacheWriteError, ModelNotFoundError, QuireError, UnsupportedModelError, WeightsError

__all__ = [
    "BundleError",
    "CacheWriteError",
    "ConfigError",
    "ContextLengthError",
    "EngineDeadError",
    "EngineRestartingError",
    "InvalidRequestError",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "QueueFullError",
    "QuireError",
    "RequestFailedError",
    "UnsupportedModelError",
    "WeightsError",
]


class BundleError(QuireError, ValueError):
    """A bundle must not be used: damaged, made for something else, or somebody else's; says what to do."""


class ConfigError(QuireError, ValueError):
    """A field of the engine's configuration is out of range or contradicts another."""


class InvalidRequestError(QuireError, ValueError):
    """A prompt or a sampling parameter is invalid. `parameter` names the field, as OpenAI's `error.param` does."""

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.code = code


class ContextLengthError(InvalidRequestError):
    """The prompt leaves no room in `max_model_len`, or cannot ever fit the KV cache."""

    def __init__(self, message: str) -> None:
        super().__init__(message, parameter="prompt", code="context_length_exceeded")


class QueueFullError(QuireError):
    """The queue limit is reached; the caller may try again later."""


class OutOfMemoryError(QuireError, MemoryError):
    """Weights plus work space plus one request of `max_model_len` do not fit the device; says which length would."""


class RequestFailedError(QuireError, RuntimeError):
    """A step failed while this request was in it; the engine goes on with the others."""


class EngineDeadError(QuireError, RuntimeError):
    """The engine was shut down, or cannot go on; no request will be served any more."""


class EngineRestartingError(EngineDeadError):
    """The engine's process ended unexpectedly and is being started again; the caller may try again later."""
