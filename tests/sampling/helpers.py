"""Requests, draws by the thousand, and the chi-square test that judges them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import chi2

from engine.requests.request import Request
from engine.runtime.sampling import (
    SampledTokens,
    SamplerState,
    SamplerVariant,
    choose_variant,
    make_state,
    needs_state,
    pack_params,
    pack_step,
    padding_params,
    reset_row,
    sample,
    unpack,
)
from engine.runtime.sampling.inputs import Column
from engine.sampling_params import SamplingParams
from tests.sampling.reference import Situation

NUM_ROWS = 16
NUM_EOS = 2
REJECT = 1e-6  # a true distribution is refused once in a million tests; the inputs are fixed, so a pass stays a pass


def make_request(situation: Situation, seed: int = 0, ignore_eos: bool = True) -> Request:
    """The engine's request for a situation; its stop tokens are the params' own unless EOS counts."""
    own = situation.params.stop_token_ids or ()
    eos = () if ignore_eos else tuple(t for t in situation.stop_token_ids if t not in own)
    return Request(
        request_id="test",
        prompt=None,
        prompt_token_ids=situation.prompt,
        params=situation.params,
        eos_token_ids=eos,
        bad_word_ids=situation.bad_word_ids,
        seed=seed,
        priority=0,
        cache_salt=None,
        arrival_time=0.0,
    )


@partial(jax.jit, static_argnames=("variant", "num_top"))
def step(
    logits: jax.Array, block: jax.Array, state: SamplerState, variant: SamplerVariant, num_top: int = 20
) -> tuple[SampledTokens, SamplerState]:
    """The sampler as the engine jits it, without donation, so that a test may use a state twice."""
    return sample(logits, unpack(block), state, variant, num_top)


def random_state(vocab_size: int, seed: int = 0, num_rows: int = NUM_ROWS) -> SamplerState:
    """A state whose rows hold what no request would have left: whoever reads an unset row shows it."""
    rng = np.random.default_rng(seed)
    state = make_state(num_rows, vocab_size, NUM_EOS)
    noise = {
        "token_info": rng.integers(0, 1 << 31, state.token_info.shape, dtype=np.int32),
        "bias": rng.choice([-np.inf, -3.0, 50.0], state.bias.shape).astype(np.float32),
        "stop_ids": rng.integers(0, vocab_size, state.stop_ids.shape, dtype=np.int32),
        "bad_words": rng.integers(-1, vocab_size, state.bad_words.shape, dtype=np.int32),
        "recent": rng.integers(0, vocab_size, state.recent.shape, dtype=np.int32),
    }
    # Every second word is complete, whatever came before; together they ban half of the vocabulary.
    noise["bad_words"][:, ::2, :-1] = -1
    noise["bad_words"][:, :, -1] %= vocab_size // 2
    return SamplerState(**{name: jnp.asarray(value) for name, value in noise.items()})


def set_rows(state: SamplerState, situations: Sequence[Situation]) -> SamplerState:
    """Reset row i for situation i, where it needs one."""
    for row, situation in enumerate(situations):
        request = make_request(situation, ignore_eos=False)
        if needs_state(request):
            state = reset_row(state, row, request, situation.outputs)
    return state


def block_of(
    requests: Sequence[Request | None], rows: Sequence[int], positions: Sequence[int], num_seqs: int, padding_row: int
) -> np.ndarray:
    """The block of one step, int32[num_seqs, W]; None is a sequence that does not sample."""
    table = np.tile(padding_params(), (padding_row + 1, 1))
    owners = {row: request for row, request in zip(rows, requests, strict=True) if request is not None}
    for row, request in owners.items():
        table[row] = pack_params(request)
    padded = np.full(num_seqs, padding_row, np.int32)
    padded[: len(requests)] = [
        padding_row if request is None else row for request, row in zip(requests, rows, strict=True)
    ]
    at = np.zeros(num_seqs, np.int32)
    at[: len(requests)] = positions
    return pack_step(table, padded, at)


def draw(
    logits: np.ndarray, situations: Sequence[Situation], num_draws: int, seed: int = 0, chunk: int = 4096
) -> np.ndarray:
    """Tokens int32[len(situations), num_draws]: all situations share each batch; every draw has its own seed.

    Args:
        logits: float32[len(situations), V].
        situations: at most `NUM_ROWS`.
        num_draws: of each.
        seed: of the draws' seeds.
        chunk: rows of a batch.
    """
    rng = np.random.default_rng(seed)
    state = set_rows(random_state(logits.shape[1]), situations)
    per_batch = chunk // len(situations)
    owner = np.tile(np.arange(len(situations)), per_batch)
    positions = [len(situations[i].prompt) + len(situations[i].outputs) for i in owner]
    requests = [make_request(s, ignore_eos=False) for s in situations]
    block = block_of([requests[i] for i in owner], list(owner), positions, chunk, state.padding_row)
    variant = choose_variant(block)
    batch_logits = np.zeros((chunk, logits.shape[1]), np.float32)
    batch_logits[: len(owner)] = logits[owner]
    draws = []
    for _ in range(-(-num_draws // per_batch)):
        seeds = rng.integers(0, 1 << 32, (len(owner), 2), dtype=np.uint32)
        block[: len(owner), Column.SEED_LOW : Column.SEED_HIGH + 1] = seeds.view(np.int32)
        tokens = np.asarray(step(batch_logits, block, state, variant)[0].token)[: len(owner)]
        draws.append(tokens.reshape(per_batch, len(situations)).T)
    return np.concatenate(draws, axis=1)[:, :num_draws]


def chi_square_p_value(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """How likely counts at least this far from the expected ones are, if the tokens come from `probabilities`.

    Tokens whose expected count is below 5 are judged as one; 0 if a token of probability 0 was drawn.
    """
    counts = np.bincount(tokens, minlength=len(probabilities)).astype(np.float64)
    expected = probabilities * len(tokens)
    if counts[probabilities == 0].any():
        return 0.0
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) < 2:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(chi2.sf(statistic, len(expected) - 1))


def situation(**params: object) -> Situation:
    """A situation of three prompt tokens and no outputs."""
    params.setdefault("max_tokens", 100)
    return Situation(SamplingParams(**params))  # type: ignore[arg-type]
