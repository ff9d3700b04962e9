"""Times of a request that more than one observer shows."""

from __future__ import annotations

from serving.http.observer import RequestEnd


def first_token_s(end: RequestEnd) -> float | None:
    """Seconds from arrival to the first token, as the engine saw it: of an answer that is sent whole, the server sees
    only the end. None without a token.
    """
    times = None if end.output is None else end.output.metrics
    return end.first_token_s if times is None else times.first_token_latency
