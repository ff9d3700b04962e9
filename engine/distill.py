"""Finds the layers with which a model can draft for itself: the facade of `quire distill-draft`."""

from __future__ import annotations

from importlib import resources

import jax

from engine.config import EngineConfig
from engine.distilling import DistillReport, DraftChoice, best_number_of_drafts
from engine.errors import ConfigError
from engine.evaluate import read_model_and_text
from engine.runtime.compile import COUNTER
from engine.runtime.progress import Report
from models.functional import Params
from models.shortening import Shortened, shorten

WINDOW = 256  # tokens
LEAST_TOKENS = 64


def distill_draft(
    config: EngineConfig, text: str | None = None, num_tokens: int = 512, progress: Report | None = None
) -> DistillReport:
    """Leave out layers one by one, each time the one that is missed least, and predict what drafting gains.

    Args:
        config: which model, in which dtype, quantized how.
        text: to measure on; None = Quire's text for calibration.
        num_tokens: of the text.
        progress: called as weights are loaded and layers left out.

    Raises:
        ConfigError: too few tokens, or a model of one layer.
        InvalidRequestError: the text is shorter than two tokens.
        QuireError: of the kind that fits: model not found, unsupported, damaged.
    """
    if num_tokens < LEAST_TOKENS:
        raise ConfigError(f"tokens must be at least {LEAST_TOKENS}, got {num_tokens}.")
    report = progress or (lambda done, total, what: None)
    if text is None:
        text = resources.files("models.quantizer").joinpath("texts", "calibration.txt").read_text("utf-8")
    with COUNTER.building():  # what is compiled here is no shape that escaped a bucket
        read = read_model_and_text(config, text, min(WINDOW, num_tokens), report, num_tokens)
        model, params = read.loaded.config, read.loaded.params
        if model.num_layers < 2:
            raise ConfigError(f"{config.load.model} has {model.num_layers} layer: there is none to leave out.")
        found = shorten(
            model, params, read.windows, lambda done, total: report(done, total, f"{done} of {total} layers left out")
        )
        choices = tuple(_choice(each, params, model.num_layers) for each in found)
    return DistillReport(config.load.model, model.num_layers, read.windows.size, choices)


def _choice(found: Shortened, params: Params, num_layers: int) -> DraftChoice:
    """With the cost of a pass: what it reads of the weights. An embedding that is no head is hardly read."""
    sizes = {name: sum(array.nbytes for array in jax.tree.leaves(weight)) for name, weight in params.items()}
    layers = sum(size for name, size in sizes.items() if name.startswith("layers."))
    head = sizes.get("head.weight", sizes["embed.weight"])
    cost = (layers * len(found.kept) / num_layers + head) / (layers + head)
    count, speedup = best_number_of_drafts(found.agreement, cost)
    return DraftChoice(found.kept, found.agreement, cost, count, speedup)
