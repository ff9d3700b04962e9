"""`evaluate_model` on tiny golden models: the text, the reference, what is refused."""

from __future__ import annotations

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError, InvalidRequestError
from engine.evaluate import evaluate_model, held_out_text
from tests.engine.helpers import TINY

TEXT = "The cat sat on the mat, and 17 mice looked on. " * 4


def config(name: str = "llama", **settings: object) -> EngineConfig:
    return EngineConfig.from_flat(model=str(TINY / name), dtype="float32", **settings)


def test_against_a_reference(compilation_cache: str) -> None:
    plain = config(compilation_cache_dir=compilation_cache)
    report = evaluate_model(config(quantization="int8", compilation_cache_dir=compilation_cache), plain, TEXT, 32)
    compared = report.comparison
    assert compared is not None and report.model.quantization is not None and compared.reference.quantization is None
    ratio = report.model.perplexity / compared.reference.perplexity
    assert compared.perplexity_change == pytest.approx(ratio - 1, abs=1e-5)
    assert 0 < compared.mean_kl < 0.05 and 0.8 < compared.agreement <= 1
    assert report.num_windows > 1 and report.num_tokens < 32 * report.num_windows
    alone = evaluate_model(plain, None, TEXT, 32)
    assert alone.comparison is None and alone.model.perplexity == pytest.approx(compared.reference.perplexity)


def test_refused(compilation_cache: str) -> None:
    plain = config(compilation_cache_dir=compilation_cache)
    with pytest.raises(ConfigError, match="window must be at least 8"):
        evaluate_model(plain, None, TEXT, 4)
    with pytest.raises(ConfigError, match="is longer than .* allows"):
        evaluate_model(plain, None, TEXT * 400, 100_000)
    with pytest.raises(InvalidRequestError, match="at least 2 are needed"):
        evaluate_model(plain, None, "")


def test_the_held_out_text_is_there() -> None:
    assert len(held_out_text().split()) > 2000
