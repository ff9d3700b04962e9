"""OpenTelemetry spans of requests, for whoever runs a collector: one span per request, a child of the caller's.

Only `spans` knows OpenTelemetry, and it is imported only if an endpoint is configured: the packages are an extra
(`quire-llm[otel]`).
"""
