"""Capacity planning: what an engine would hold, and how fast it could be at best, from a model's config alone.

The problem: which device, which precision and which limits suit a model is to be known before weights are downloaded
and a device is rented. The idea: all sizes but one follow from shapes, with the engine's own code, so that they are
those that an engine reports; the one that does not, the work space of XLA's executables, is compiled for a CPU and
estimated for a device that is not there.

    config.json, GGUF header ─▶ shapes ─▶ bytes of weights, state, KV block (exact) ┐
    settings ─▶ RuntimeLimits ─▶ buckets ─▶ work space (compiled, or estimated) ────┴─▶ KV blocks ─▶ concurrency
    devices.json ─▶ bandwidth, rates ─▶ least time of a step (a model: bytes and operations, perfectly overlapped)

It knows nothing of requests, and promises no speed: a floor is what cannot be beaten.
"""
