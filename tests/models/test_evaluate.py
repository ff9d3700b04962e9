"""The meter against plain numpy: losses, divergences and agreement of tiny golden models, dense and packed."""

from __future__ import annotations

import numpy as np
import pytest

from models.loading.load import LoadedModel, load_model
from models.quantizer.evaluate import Scores, cut_windows, predict, score
from tests.engine.helpers import TINY, golden_prompts

LLAMA = TINY / "llama"


def distributions(model: LoadedModel, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities float64[W, L-1, V] from the meter's hidden states, and the numbers they are the softmax of."""
    found = predict(model.config, model.params, windows)
    logits = found.hidden[:, :-1].astype(np.float64) @ np.asarray(found.table, np.float64).T
    wide = np.exp(logits - logits.max(-1, keepdims=True))
    return wide / wide.sum(-1, keepdims=True), logits


def test_losses_are_those_of_the_golden_file() -> None:
    """The golden log probabilities were made by another implementation."""
    model = load_model(LLAMA, dtype="float32")
    golden = max(golden_prompts(LLAMA), key=lambda one: len(one.prompt))
    tokens = golden.prompt + golden.continuation
    windows = np.asarray([tokens], np.int32)
    scores = score(predict(model.config, model.params, windows), windows, chunk_rows=7)
    assert scores.losses.shape == (1, len(golden.logprobs))
    np.testing.assert_allclose(scores.losses[0], -golden.logprobs, atol=2e-4)


def test_against_numpy() -> None:
    model = load_model(LLAMA, dtype="float32")
    packed = load_model(LLAMA, dtype="float32", quantization="int8_w8a8")
    windows = np.random.default_rng(0).integers(3, 300, (3, 19), dtype=np.int32)
    reference = predict(model.config, model.params, windows)
    scores = score(predict(packed.config, packed.params, windows), windows, reference, chunk_rows=16)
    (p_ref, _), (p, _) = distributions(model, windows), distributions(packed, windows)
    losses = -np.log(np.take_along_axis(p, windows[:, 1:, None], -1)[..., 0])
    divergences = (p_ref * np.log(p_ref / p)).sum(-1)
    assert scores.divergences is not None and scores.mean_kl is not None
    np.testing.assert_allclose(scores.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(scores.divergences, divergences, atol=2e-6, rtol=1e-2)
    assert scores.agreement == pytest.approx((p_ref.argmax(-1) == p.argmax(-1)).mean(), abs=0.02)
    assert scores.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    assert scores.mean_kl > 1e-7 and scores.num_tokens == 54


def test_a_model_does_not_differ_from_itself() -> None:
    model = load_model(LLAMA, dtype="bfloat16")
    windows = np.arange(3, 43, dtype=np.int32).reshape(2, 20)
    found = predict(model.config, model.params, windows)
    scores = score(found, windows, found)
    assert scores.mean_kl == 0 and scores.agreement == 1
    assert scores.change(scores) == (0, 0)


def test_windows_do_not_see_each_other() -> None:
    model = load_model(LLAMA, dtype="float32")
    windows = np.random.default_rng(1).integers(3, 300, (2, 20), dtype=np.int32)
    both = score(predict(model.config, model.params, windows), windows).losses
    second = score(predict(model.config, model.params, windows[1:]), windows[1:]).losses
    np.testing.assert_array_equal(both[1:], second)


def test_change_is_of_paired_losses() -> None:
    plain = Scores(np.asarray([[1.0, 2.0, 3.0]], np.float32))
    worse = Scores(np.asarray([[1.1, 2.2, 3.3]], np.float32))
    growth, error = worse.change(plain)
    assert growth == pytest.approx(np.exp(0.2) - 1, rel=1e-5)
    assert error == pytest.approx(np.exp(0.2) * np.std([0.1, 0.2, 0.3], ddof=1) / np.sqrt(3), rel=1e-5)


class TestWindows:
    def test_equal_lengths_and_little_is_dropped(self) -> None:
        windows = cut_windows(range(100, 1123), 100)
        assert windows.shape == (11, 93) and windows[0, 0] == 100
        np.testing.assert_array_equal(windows.reshape(-1), np.arange(100, 1123))

    def test_bos_counts(self) -> None:
        windows = cut_windows([5, 6, 7, 8], 3, first=1)
        np.testing.assert_array_equal(windows, [[1, 5, 6], [1, 7, 8]])

    @pytest.mark.parametrize(("tokens", "length", "first"), [([5], 8, None), ([5, 6, 7], 1, None), ([5, 6], 2, 1)])
    def test_too_few(self, tokens: list[int], length: int, first: int | None) -> None:
        with pytest.raises(ValueError, match="must be 2 or more"):
            cut_windows(tokens, length, first)


def test_what_cannot_be_compared() -> None:
    model = load_model(LLAMA, dtype="float32")
    windows = np.full((1, 8), 5, np.int32)
    found = predict(model.config, model.params, windows)
    with pytest.raises(ValueError, match="are not those of the predictions"):
        score(found, windows[:, :7])
    with pytest.raises(ValueError, match="token ids must be 0 to"):
        predict(model.config, model.params, windows + model.config.vocab_size)
