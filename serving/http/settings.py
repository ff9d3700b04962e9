"""`ServerSettings`: how the server listens, whom it lets in, and what it grants a client. One flag per field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.errors import ConfigError


def _setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = choices
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens and what it allows.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 = all of IPv4, :: = all")
    port: int = _setting(8000, "port to listen on; 0 = any free one, which is then printed")
    uds: str | None = _setting(None, "listen on this Unix socket instead of host and port")
    ssl_keyfile: str | None = _setting(None, "key of the certificate, for HTTPS")
    ssl_certfile: str | None = _setting(None, "certificate, for HTTPS")
    root_path: str = _setting("", "path that a proxy in front strips from each URL, for /openapi.json")
    api_key: list[str] | None = _setting(
        None, "key that clients must send as a bearer token; may be given again (default: QUIRE_API_KEY, else none)"
    )
    allowed_origins: list[str] | None = _setting(
        None, "origin whose pages in a browser may call the server, or *; may be given again (default: none)"
    )
    served_model_name: list[str] | None = _setting(
        None, "name of the model in the API; may be given again, the first is used in answers (default: the model)"
    )
    chat_template: str | None = _setting(None, "file of a Jinja chat template to use instead of the model's")
    trust_request_chat_template: bool = _setting(False, "let requests bring chat templates of their own")
    enable_auto_tool_choice: bool = _setting(False, "let the model choose to call tools; needs tool_call_parser")
    tool_call_parser: str | None = _setting(None, "how the model writes tool calls")
    reasoning_parser: str | None = _setting(None, "how the model writes its reasoning")
    max_concurrent_requests: int | None = _setting(
        None,
        "requests at a time; more are answered 503 (default: unlimited; see also max_num_queued_reqs of the engine)",
    )
    max_request_bytes: int = _setting(32 * 2**20, "size of a request's body above which it is answered 413")
    request_timeout: float | None = _setting(None, "seconds after which a request is ended (default: never)")
    receive_timeout: float = _setting(60.0, "seconds within which a client must have sent its headers, then its body")
    send_timeout: float = _setting(60.0, "seconds after which a client that does not read its answer is given up")
    keepalive_timeout: float = _setting(75.0, "seconds that an idle connection is kept")
    shutdown_timeout: float = _setting(30.0, "seconds that requests have to end after SIGTERM, before they are aborted")
    request_log: bool = _setting(True, "write a line per finished request: tokens, times, how it ended")
    log_format: str = _setting("text", "how that line is written", choices=("text", "json"))
    access_log: bool = _setting(False, "log each HTTP request in a line as well, also those that generate nothing")
    otlp_traces_endpoint: str | None = _setting(
        None, "URL of an OpenTelemetry collector (OTLP over HTTP) that gets a span per request (default: none)"
    )
    enable_log_requests: bool = _setting(False, "log the parameters of each request, never its prompt")
    engine_process: bool = _setting(True, "run the engine in a process of its own, apart from HTTP")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be 0 to 65535, got {self.port}.")
        for name in ("receive_timeout", "send_timeout", "keepalive_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a number of seconds above 0, got {getattr(self, name)}.")
        if not 0 <= self.shutdown_timeout < float("inf"):
            raise ConfigError(f"shutdown_timeout must be at least 0 seconds, got {self.shutdown_timeout}.")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ConfigError(f"request_timeout must be above 0 seconds, got {self.request_timeout}.")
        if self.max_request_bytes < 1:
            raise ConfigError(f"max_request_bytes must be at least 1, got {self.max_request_bytes}.")
        if self.max_concurrent_requests is not None and self.max_concurrent_requests < 1:
            raise ConfigError(f"max_concurrent_requests must be at least 1, got {self.max_concurrent_requests}.")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("ssl_keyfile and ssl_certfile must be given together.")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ConfigError("enable_auto_tool_choice needs tool_call_parser.")
        if any(not key for key in self.api_key or ()):
            raise ConfigError("api_key must not be empty.")
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path must begin with '/', got {self.root_path!r}.")
