"""What an evaluation finds: plain values, no jax. `engine/evaluate.py` makes them."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_WINDOW = 512  # tokens


@dataclass(frozen=True)
class Evaluated:
    """What was measured of one model.

    Attributes:
        model: its reference, as given.
        quantization: in words, None if nothing is packed.
        dtype: of activations.
        perplexity: of the text.
    """

    model: str
    quantization: str | None
    dtype: str
    perplexity: float


@dataclass(frozen=True)
class Comparison:
    """How a model's predictions differ from a reference's.

    Attributes:
        reference: what it is compared with.
        perplexity_change: relative; 0.01 = 1 % more than the reference's.
        standard_error: of that change.
        mean_kl: Kullback-Leibler divergence from the reference's distributions, in nats per token.
        agreement: the part of tokens for which both find the same one likeliest.
    """

    reference: Evaluated
    perplexity_change: float
    standard_error: float
    mean_kl: float
    agreement: float


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate_model` found.

    Attributes:
        num_tokens: tokens that were predicted, in `num_windows` windows of `window` tokens.
        comparison: None without a reference.
    """

    model: Evaluated
    num_tokens: int
    num_windows: int
    window: int
    comparison: Comparison | None = None
