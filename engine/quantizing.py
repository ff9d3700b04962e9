"""What `quire quantize` is asked for and finds: plain values, no jax. `engine/quantize.py` does it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.evaluation import EvaluationReport
from models.quantizer.partial import LayerReport
from models.quantizer.types import BITS, FORMATS, METHODS, Settings

__all__ = ["BITS", "FORMATS", "METHODS", "LayerReport", "QuantizationReport", "Settings"]


@dataclass(frozen=True)
class QuantizationReport:
    """What became of a model.

    Attributes:
        layers: errors of each layer's matrices, and of the layer with all before it.
        num_tokens: calibrated with.
        size_bytes: of the checkpoint's files.
        evaluation: of the result beside the original on the held-out text; None if it was not asked for.
    """

    layers: tuple[LayerReport, ...]
    num_tokens: int
    size_bytes: int
    evaluation: EvaluationReport | None
