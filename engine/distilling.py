"""What `quire distill-draft` finds: plain values, no jax. `engine/distill.py` makes them."""

from __future__ import annotations

from dataclasses import dataclass

MOST_DRAFTS = 8  # that are thought of: more than that are seldom right in a row


@dataclass(frozen=True)
class DraftChoice:
    """A shortened model that may draft for the whole one.

    Attributes:
        layers: indices of the layers that it keeps.
        agreement: share of a text's tokens for which its likeliest next token is the whole model's.
        cost: of one of its passes, as a part of the whole model's: bytes of weights that are read.
        num_drafts: the number of drafts that pays most.
        speedup: predicted by agreement and cost, if a step that verifies costs what a step without drafts costs.
    """

    layers: tuple[int, ...]
    agreement: float
    cost: float
    num_drafts: int
    speedup: float


@dataclass(frozen=True)
class DistillReport:
    """All choices, most layers first.

    Attributes:
        model: its reference, as given.
        num_layers: of the whole model.
        num_tokens: of the text.
        choices: one for each number of layers.
    """

    model: str
    num_layers: int
    num_tokens: int
    choices: tuple[DraftChoice, ...]

    @property
    def best(self) -> DraftChoice:
        """The choice with the largest predicted speedup."""
        return max(self.choices, key=lambda choice: choice.speedup)


def best_number_of_drafts(agreement: float, cost: float) -> tuple[int, float]:
    """How many drafts a step should have, and the speedup then: expected tokens over the cost of drafts and step.

    Leviathan et al. 2023 (arXiv 2211.17192), theorem 3.8, with `agreement` for the chance that a draft is right.
    """
    rate = min(agreement, 0.999)
    speedups = {
        count: (1 - rate ** (count + 1)) / (1 - rate) / (1 + count * cost) for count in range(1, MOST_DRAFTS + 1)
    }
    best = max(speedups, key=lambda count: speedups[count])
    return best, speedups[best]
