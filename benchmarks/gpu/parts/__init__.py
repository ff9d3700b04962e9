"""The parts of a session, in the order in which they are run: what all others need first, what is nice to have last."""

from __future__ import annotations

from benchmarks.gpu.part import Part
from benchmarks.gpu.parts import attention, engine, environment, graphs, matmul, numerics, start, step, tune

_ORDER = (
    environment.PART,
    numerics.PART,
    attention.PART,
    matmul.PART,
    step.PART,
    engine.PART,
    start.PART,
    graphs.PART,
    tune.PART,
)
PARTS: dict[str, Part] = {part.name: part for part in _ORDER}
