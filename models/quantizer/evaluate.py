"""The meter: how well a model predicts a text, and how far its predictions lie from those of another model.

    windows = cut_windows(token_ids, 512)
    reference = predict(plain.config, plain.params, windows)
    scores = score(predict(packed.config, packed.params, windows), windows, reference)
    scores.perplexity, scores.mean_kl, scores.agreement

Works on any parameters that the decoder runs, dense or packed, in the dtype of those that are not packed. What is kept
of a model between the two calls is hidden states and its head: two models need not be in memory at the same time, and
logits exist for some rows at a time only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.decoder import Decoder
from models.functional import FunctionalModel, Params
from models.inputs import ForwardInputs
from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.matmul import matmul
from pallas_kernels.paged_attention import AttentionProblem
from pallas_kernels.ragged import RaggedBatch

PAGE_SIZE = 16
CHUNK_ROWS = 256  # rows of logits at a time: 50 MB of float32 with a vocabulary of 49,152


@dataclass(frozen=True)
class Predictions:
    """What a model makes of windows of tokens, one product short of logits.

    Attributes:
        hidden: [W, L, E], after the final norm.
        table: [V, E], the head.
    """

    hidden: np.ndarray
    table: jax.Array


@dataclass(frozen=True)
class Scores:
    """Of one model, token by token; the first token of a window is given, not predicted.

    Attributes:
        losses: float32[W, L-1], minus the log probability of each token, in nats.
        divergences: float32[W, L-1], the Kullback-Leibler divergence of the model's distribution from the reference's,
            sum of p_ref * log(p_ref / p), in nats; None without a reference.
        agrees: bool[W, L-1], whether both find the same token likeliest; None without a reference.
    """

    losses: np.ndarray
    divergences: np.ndarray | None = None
    agrees: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that were predicted."""
        return self.losses.size

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(float(self.losses.mean(dtype=np.float64)))

    @property
    def mean_kl(self) -> float | None:
        """Mean divergence, in nats."""
        return None if self.divergences is None else float(self.divergences.mean(dtype=np.float64))

    @property
    def agreement(self) -> float | None:
        """The part of tokens for which both find the same one likeliest."""
        return None if self.agrees is None else float(self.agrees.mean())

    def change(self, reference: Scores) -> tuple[float, float]:
        """By how much perplexity grows from the reference's on the same tokens, relative, and that number's standard
        error if tokens were drawn one by one (neighbours are alike, so the true one is a little larger).
        """
        differences = self.losses.astype(np.float64) - reference.losses
        growth = math.exp(float(differences.mean()))
        return growth - 1, growth * float(differences.std()) / math.sqrt(max(1, differences.size - 1))


def cut_windows(token_ids: Sequence[int], length: int, first: int | None = None) -> np.ndarray:
    """A text as windows of one length, as many as are needed; at the end fewer tokens are dropped than there are
    windows.

    Args:
        token_ids: of the text, without special tokens.
        length: most tokens of a window.
        first: token that begins each window (BOS), counted in its length.

    Returns:
        int32[W, L], L at most `length`.

    Raises:
        ValueError: fewer than two tokens, or no room for two in a window.
    """
    room = length - (first is not None)
    if len(token_ids) < 2 or room < 2:
        raise ValueError(f"{len(token_ids)} tokens in windows of {length}: both must be 2 or more, and 1 for BOS.")
    count = -(-len(token_ids) // room)
    size = len(token_ids) // count
    windows = np.asarray(token_ids[: count * size], np.int32).reshape(count, size)
    return windows if first is None else np.insert(windows, 0, first, axis=1)


def predict(
    config: ModelConfig,
    params: Params,
    windows: np.ndarray,
    *,
    matmul_implementation: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Run a model over windows, each by itself.

    Args:
        config: the decoder.
        params: its weights, dense or packed; activations are of the dtype of the final norm's.
        windows: int32[W, L].
        matmul_implementation: as in `models.layers.product.product`.
        progress: called after each window with windows done and their number.

    Raises:
        ValueError: windows hold ids outside of the vocabulary.
    """
    if windows.min() < 0 or windows.max() >= config.vocab_size:
        raise ValueError(f"token ids must be 0 to {config.vocab_size - 1}; found {windows.min()} to {windows.max()}.")
    dtype = str(jax.tree.leaves(params["norm.weight"])[0].dtype)
    run = _runner(config, dtype, matmul_implementation)
    hidden = np.empty((*windows.shape, config.hidden_size), jnp.dtype(dtype))
    for index, window in enumerate(windows):
        hidden[index] = run(params, window)
        if progress is not None:
            progress(index + 1, len(windows))
    table = params["embed.weight" if config.tie_word_embeddings else "head.weight"]
    if not isinstance(table, jax.Array):
        raise ValueError("the head is packed: only dense heads can be measured.")
    return Predictions(hidden, table)


@lru_cache(maxsize=8)
def _runner(config: ModelConfig, dtype: str, implementation: str) -> Callable[[Params, np.ndarray], jax.Array]:
    """A function of parameters and int32[L] to hidden states [L, E]; equal models share what is compiled."""
    problem = AttentionProblem(config.num_heads, config.num_kv_heads, config.head_dim, PAGE_SIZE, dtype, dtype)
    model = FunctionalModel(lambda: Decoder(config, problem, dtype=dtype, matmul=implementation))

    @jax.jit
    def run(params: Params, ids: jax.Array) -> jax.Array:
        length = ids.shape[0]
        num_pages = -(-length // PAGE_SIZE)
        layout = KVLayout(num_pages + 1, config.num_kv_heads, PAGE_SIZE, config.head_dim, dtype)  # page 0 is nobody's
        batch = RaggedBatch(
            query_start=jnp.asarray([0, length], jnp.int32),
            context_lens=jnp.asarray([length], jnp.int32),
            block_tables=1 + jnp.arange(num_pages, dtype=jnp.int32)[None],
            num_seqs=jnp.asarray(1, jnp.int32),
        )
        positions = jnp.arange(length, dtype=jnp.int32)
        inputs = ForwardInputs(ids, positions, jnp.asarray([length - 1], jnp.int32), batch)
        return model.bind(params)(inputs, tuple(layout.empty() for _ in config.layers))[0]

    return run


def score(
    predictions: Predictions, windows: np.ndarray, reference: Predictions | None = None, chunk_rows: int = CHUNK_ROWS
) -> Scores:
    """Losses of a model's predictions, and how they differ from a reference's.

    Args:
        predictions: of the model.
        windows: int32[W, L], what was predicted.
        reference: another model's predictions of the same windows.
        chunk_rows: rows of logits, [rows, V] of each model, that exist at a time.

    Raises:
        ValueError: the models' vocabularies differ, or the windows are not those of the predictions.
    """
    both = (predictions,) if reference is None else (predictions, reference)
    if any(one.hidden.shape[:2] != windows.shape for one in both):
        raise ValueError(f"windows {windows.shape} are not those of the predictions {predictions.hidden.shape[:2]}.")
    if len({one.table.shape[0] for one in both}) > 1:
        sizes = " and ".join(str(one.table.shape[0]) for one in both)
        raise ValueError(f"vocabularies of {sizes} tokens: distributions over them cannot be compared.")
    targets = windows[:, 1:].reshape(-1)
    rows = [one.hidden[:, :-1].reshape(len(targets), -1) for one in both]
    parts = []
    for start in range(0, len(targets), chunk_rows):
        part = slice(start, start + chunk_rows)
        hidden = [(_padded(wide[part], chunk_rows), one.table) for wide, one in zip(rows, both, strict=True)]
        found = _score_rows(hidden, _padded(targets[part], chunk_rows))
        parts.append([np.asarray(array)[: len(targets[part])] for array in found])
    columns = [np.concatenate(column).reshape(len(windows), -1) for column in zip(*parts, strict=True)]
    return Scores(*columns)


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    """Zeros below, so that all chunks have one shape."""
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))


@jax.jit
def _score_rows(hidden: list[tuple[jax.Array, jax.Array]], targets: jax.Array) -> tuple[jax.Array, ...]:
    """Losses, divergences and agreement of rows, the latter two if there is a reference; see `Scores`."""
    logits = [matmul(rows, table, transposed=True, out_dtype=jnp.float32) for rows, table in hidden]
    log_probs = [jax.nn.log_softmax(wide) for wide in logits]
    losses = -jnp.take_along_axis(log_probs[0], targets[:, None], axis=-1)[:, 0]
    if len(logits) == 1:
        return (losses,)
    divergences = (jnp.exp(log_probs[1]) * (log_probs[1] - log_probs[0])).sum(-1)
    return losses, divergences, logits[0].argmax(-1) == logits[1].argmax(-1)
