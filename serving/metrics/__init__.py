"""Prometheus metrics: what a dashboard made for vLLM finds under vLLM's names, and a few of Quire's own.

Two sources. What the engine counts (steps, tokens, caches) is read from its snapshot when Prometheus asks, so it costs
nothing in between. What belongs to requests (latencies, lengths) comes from the server's observer: one bisection and
two additions per observation, no locks, since all of it happens in the event loop.

    Observer ──▶ RequestMetrics ─┐
    middleware ──▶ HttpMetrics ──┼─▶ Metrics.render ──▶ GET /metrics
    client.snapshot() ───────────┘

It does not know what an endpoint does, and it keeps nothing on disk.
"""
