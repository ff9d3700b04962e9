"""Each method of `speculative_config` on the language of `chains.py`: its real proposer or drafter, small networks.

Proposers of the host guess from prompts and outputs, as in an engine. Drafters of the device run as they are; in the
place of a network's layers they have a table of logits after each token, which is not the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.requests.request import Request
from engine.requests.sequence import Sequence
from engine.runtime.drafting.drafter import DeviceDrafter, DraftRows
from engine.runtime.drafting.eagle import EagleDrafter, EagleParts, EagleState
from engine.runtime.drafting.layer_skip import LayerSkip
from engine.runtime.drafting.medusa import MedusaDrafter
from engine.runtime.drafting.model import DraftModel
from engine.runtime.drafting.recent import RecentStates
from engine.runtime.sampling import SamplerVariant, choose_variant, unpack
from engine.runtime.sampling.inputs import Column
from engine.runtime.speculation import make_proposer
from engine.sampling_params import SamplingParams
from engine.speculative.proposer import Proposer
from engine.speculative.settings import SpeculativeSettings
from models.inputs import ForwardInputs
from pallas_kernels.kv_layout import KVLayout
from tests.speculative.chains import DRAFTER, NO_DRAFT, NUM_DRAFTS, TARGET, Drafter, Here, V

PAGE, MOST_TOKENS = 4, 16  # of a sequence


def _sequence(prompt: tuple[int, ...], outputs: tuple[int, ...]) -> Sequence:
    sequence = Sequence(Request("r", None, prompt, SamplingParams(), (), (), 0, 0, None, 0.0))
    sequence.output_token_ids = list(outputs)
    return sequence


def _by_proposer(make: Callable[[], Proposer]) -> Drafter:
    """Guesses of the host, from each chain's own tokens."""

    @cache
    def after(known: tuple[int, ...]) -> tuple[int, ...]:
        proposer, sequence = make(), _sequence(known[:1], known[1:])
        proposer.extend(sequence)
        return proposer.propose(sequence)

    def drafts(here: Here) -> np.ndarray:
        found = np.full((len(here.last), NUM_DRAFTS), NO_DRAFT, np.int32)
        for row, known in enumerate(here.known.tolist()):
            guess = after(tuple(token for token in known if token >= 0))
            found[row, : len(guess)] = guess
        return found

    return drafts


def _ngram() -> Proposer:
    return make_proposer(SpeculativeSettings(method="ngram", num_speculative_tokens=NUM_DRAFTS, prompt_lookup_min=1))


def _suffix() -> Proposer:
    """With outputs of the past, which take each token's likeliest successor."""
    settings = SpeculativeSettings(
        method="suffix", num_speculative_tokens=NUM_DRAFTS, suffix_decoding_max_spec_factor=2.0
    )
    proposer = make_proposer(settings)
    for token in range(V):
        output = [token]
        for _ in range(8):
            output.append(int(TARGET[output[-1]].argmax()))
        past = _sequence((token,), tuple(output))
        proposer.extend(past)
        proposer.forget(past)
    return proposer


def _one_hot(tokens: jax.Array) -> jax.Array:
    return jax.nn.one_hot(tokens, V, dtype=jnp.float32)


class _TableDecoder:
    """A `Decoder` whose state is the token that came in."""

    def __init__(self, table: jax.Array) -> None:
        self.table = table

    def __call__(self, inputs: ForwardInputs, pages: Any) -> tuple[jax.Array, Any]:
        return _one_hot(inputs.token_ids)[inputs.logit_rows], pages

    def logits(self, hidden: jax.Array) -> jax.Array:
        return jnp.dot(hidden, self.table, precision="highest")


class _TableHead:
    """An `EagleHead` whose features are the token that came in and a little of those that came with it."""

    def __init__(self, table: jax.Array) -> None:
        self.table = table

    def __call__(self, ends: Any, tokens: jax.Array, features: jax.Array, *rest: Any) -> tuple[jax.Array, Any]:
        return _one_hot(tokens) + 0.2 * features, rest[-1]

    def logits(self, ends: Any, features: jax.Array) -> jax.Array:
        return jnp.einsum("se,ev->sv", features, self.table, precision="highest")


class _TableHeads:
    """`MedusaHeads` on the token before the last, which is all that the model's state knows."""

    def __init__(self, tables: jax.Array) -> None:
        self.tables = tables

    def logits(self, hidden: jax.Array, head: int) -> jax.Array:
        return jnp.dot(hidden, self.tables[head], precision="highest")


def _bound(module: Callable[[jax.Array], Any]) -> Any:
    """In the place of a `FunctionalModel`."""
    return SimpleNamespace(bind=lambda weights: module(weights["table"]))


def _eagle(table: np.ndarray) -> tuple[DeviceDrafter, Callable[[Here], Any]]:
    layout = KVLayout(1, 1, PAGE, 8, "float32")
    params: Any = {"table": jnp.asarray(table)}
    ends: Any = SimpleNamespace(bind=lambda weights: None)
    parts = EagleParts(_bound(_TableHead), params, ends, {}, layout, (), 1, V)
    return EagleDrafter(parts, NUM_DRAFTS, "float32"), lambda here: EagleState((), _states(here))


def _states(here: Here) -> RecentStates:
    """The model's states as the last step left them: of each token before the last, what it is."""
    count = len(here.last)
    num_known = here.block[:, Column.POSITION]
    before = here.known[np.arange(count), (here.known >= 0).sum(1) - 2]
    states = np.zeros((count, NUM_DRAFTS + 1, V), np.float32)
    states[np.arange(count), -1, before] = here.known[:, 1] >= 0
    last = jnp.asarray(num_known - 2, jnp.int32)
    return RecentStates(jnp.asarray(states), last, last)


def _medusa() -> tuple[DeviceDrafter, Callable[[Here], Any]]:
    """Head i looks 2 + i tokens on."""
    step = np.exp(TARGET) / np.exp(TARGET).sum(-1, keepdims=True)
    ahead = [np.linalg.matrix_power(step, 2 + head) for head in range(NUM_DRAFTS)]
    params: Any = {"table": jnp.asarray(np.log(np.stack(ahead)), jnp.float32)}
    return MedusaDrafter(_bound(_TableHeads), params, NUM_DRAFTS, V, "float32"), _states


def _layer_skip() -> tuple[DeviceDrafter, Callable[[Here], Any]]:
    params: Any = {"table": jnp.asarray(DRAFTER), "layers.1.unused": jnp.zeros(1)}
    return LayerSkip(_bound(_TableDecoder), params, [0]), lambda here: ()


def _draft_model() -> tuple[DeviceDrafter, Callable[[Here], Any]]:
    layout, params = KVLayout(1, 1, PAGE, 8, "float32"), {"table": jnp.asarray(DRAFTER)}
    return DraftModel(_bound(_TableDecoder), params, layout, 1), lambda here: ()


def _eagle_few_tokens() -> np.ndarray:
    """Logits of a head that does not know one token, which is not the likeliest after any."""
    table = DRAFTER.copy()
    table[:, np.setdiff1d(np.arange(V), TARGET.argmax(-1))[0]] = -1e30
    return table


def _by_drafter(make: Callable[[], tuple[DeviceDrafter, Callable[[Here], Any]]]) -> Drafter:
    """Guesses of the device."""

    @cache
    def built() -> tuple[DeviceDrafter, Callable[[Here], Any], Callable[..., Any]]:
        drafter, state = make()

        def draft(weights: Any, state: Any, rows: DraftRows, variant: SamplerVariant) -> jax.Array:
            return drafter.draft(weights, state, (jnp.zeros(1), jnp.zeros(1)), rows, NUM_DRAFTS, variant).token_ids

        return drafter, state, jax.jit(draft, static_argnames="variant")

    def drafts(here: Here) -> np.ndarray:
        drafter, state, run = built()
        count = len(here.last)
        variant = choose_variant(here.block)
        variant = SamplerVariant.GREEDY if variant is SamplerVariant.GREEDY else SamplerVariant.RANDOM
        rows = DraftRows(
            rows=jnp.arange(count, dtype=jnp.int32),
            last_token=jnp.asarray(here.last, jnp.int32),
            num_known=jnp.asarray(here.block[:, Column.POSITION]),
            num_drafts=jnp.full((count,), NUM_DRAFTS, jnp.int32),
            block_tables=jnp.zeros((count, MOST_TOKENS // PAGE), jnp.int32),
            sampling=unpack(jnp.asarray(here.block)),
        )
        return np.asarray(run(drafter.weights, state(here), rows, variant=variant))

    return drafts


METHODS: dict[str, Drafter] = {
    "ngram": _by_proposer(_ngram),
    "suffix": _by_proposer(_suffix),
    "layer_skip": _by_drafter(_layer_skip),
    "draft_model": _by_drafter(_draft_model),
    "medusa": _by_drafter(_medusa),
    "eagle": _by_drafter(partial(_eagle, DRAFTER)),
    "eagle3": _by_drafter(lambda: _eagle(_eagle_few_tokens())),
}
