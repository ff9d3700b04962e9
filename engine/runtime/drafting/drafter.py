"""`DeviceDrafter`: what makes guesses on the device. Derive from it, and `make_drafter` in
`build.py` builds it for its method.

A drafter brings weights and a state. Both are pytrees of arrays: weights stay, the state goes from step to step,
donated, and no array may be in it twice, nor in the model's own state. Its functions are traced into executables:

    draft     at the start of each step that verifies drafts, one executable per verify bucket and variant
    observe   after the forward pass of every step, prompts included, if `observes`; one executable per bucket. For
              drafters that live on the model's hidden states: heads, say

What it computes ahead of time on the host's command (a prompt that a small model has not read yet) it starts in
`prepare`, by executables that it names in `jobs`. KV pages of its own it keeps in the state, one page per block of the
engine's pool, so that block tables serve both; `block_bytes` says what a block of them costs.

Nothing that a drafter does may change an answer: of the model's cache it may write positions num_known - 1 to
num_known - 2 + num_drafts of each row, which the step's own forward pass writes again before anybody reads them, and no
other. A row that has no drafts (padding among them) writes nowhere but the null page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax

from engine.requests.sequence import Sequence
from engine.runtime.buckets import Bucket, BucketTable
from engine.runtime.device_state import RowTokens
from engine.runtime.packing import StepLayout, TokenRows
from engine.runtime.sampling.inputs import SamplerVariant, SamplingInputs
from engine.scheduling.plan import StepPlan
from pallas_kernels.kv_layout import Pages

Job = tuple[Any, str, Callable[[], Any]]  # key, name for the progress bar, function that lowers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftRows:
    """The S sequences of a step that is to verify drafts, as the device knows them when the step begins.

    Attributes:
        rows: int32[S], of the device state; the padding row for padding.
        last_token: int32[S], the token whose keys and values are not computed yet, at position num_known - 1.
        num_known: int32[S], tokens of the sequence.
        num_drafts: int32[S], how many to make; 0 for padding and for sequences that have no room.
        block_tables: int32[S, B].
        sampling: of the token after the known ones (`position` = num_known).
    """

    rows: jax.Array
    last_token: jax.Array
    num_known: jax.Array
    num_drafts: jax.Array
    block_tables: jax.Array
    sampling: SamplingInputs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drafted:
    """What `draft` gives.

    Attributes:
        token_ids: int32[S, K]; arbitrary ids of the vocabulary beyond a row's num_drafts.
        cache: the model's pages, changed at most as the module says.
        state: the drafter's.
    """

    token_ids: jax.Array
    cache: tuple[Pages, ...]
    state: Any


@dataclass(frozen=True)
class JobShapes:
    """What `DeviceDrafter.jobs` compiles for.

    Attributes:
        state: of `make_state`.
        block_tables: int32[R+1, B].
        known: of the rows.
        buckets: of the engine.
        layout: of a bucket.
    """

    state: Any
    block_tables: Any
    known: RowTokens
    buckets: BucketTable
    layout: Callable[[Bucket], StepLayout]


@dataclass(frozen=True)
class DeviceView:
    """What `DeviceDrafter.prepare` may use.

    Attributes:
        block_tables: int32[R+1, B], with all entries of the plan's sequences that were there before it.
        known: of the rows.
        buckets: of the engine.
        layout: of a bucket.
        compiled: key of `DeviceDrafter.jobs` -> executable.
    """

    block_tables: jax.Array
    known: RowTokens
    buckets: BucketTable
    layout: Callable[[Bucket], StepLayout]
    compiled: Callable[[Any], Callable[..., Any]]


class DeviceDrafter(ABC):
    """Makes guesses on the device.

    Attributes:
        weights: pytree of arrays; those that are the model's own are shared, not copied.
        extra_bytes: of weights that are not the model's own, and of the state besides pages.
        block_bytes: of the state, per block of the pool.
        observes: whether `observe` is to be called.
        taps: after how many of the model's layers it wants to see the residual stream instead of the final states.
    """

    weights: Any
    extra_bytes: int = 0
    block_bytes: int = 0
    observes: bool = False
    taps: tuple[int, ...] = ()

    @abstractmethod
    def draft(
        self, weights: Any, state: Any, cache: tuple[Pages, ...], rows: DraftRows, count: int, variant: SamplerVariant
    ) -> Drafted:
        """Guess the next tokens of each row. Traced.

        Args:
            weights: `self.weights`.
            state: of `make_state`, or what the last call gave.
            cache: the model's pages.
            rows: S sequences.
            count: K, static; drafts of a row that has room.
            variant: static; GREEDY if no row draws at random, otherwise RANDOM.
        """

    def make_state(self, num_pages: int, num_rows: int) -> Any:
        """A fresh state.

        Args:
            num_pages: KV blocks of the pool, the null block included.
            num_rows: R, rows of sequences; the padding row is one more.
        """
        del num_pages, num_rows
        return ()

    def observe(self, weights: Any, state: Any, rows: TokenRows, hidden: jax.Array) -> Any:
        """Take note of the tokens of a step and of what the model made of them; gives the new state. Traced.

        Args:
            weights: `self.weights`.
            state: as of `draft`.
            rows: T tokens of S sequences with positions and block tables, drafts included (which of them were right is
                not known yet; the next `draft` has `num_known`).
            hidden: [T, E] after the final norm; with taps the streams side by side, [T, taps * E].
        """
        del weights, rows, hidden
        return state

    def jobs(self, shapes: JobShapes) -> Iterable[Job]:
        """Executables of its own besides `draft` and `observe`."""
        del shapes
        return ()

    def prepare(self, plan: StepPlan, state: Any, device: DeviceView) -> Any:
        """Called on the host before each step, with drafts or without; gives the new state.

        Args:
            plan: the step that is about to be dispatched.
            state: as of `draft`.
            device: what there is besides.
        """
        del plan, device
        return state

    def lags(self, sequence: Sequence) -> bool:
        """Whether drafting for the sequence needs all its tokens on the host first."""
        del sequence
        return False

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        del sequence

    def forget_all(self) -> None:  # noqa: B027  # most have nothing to forget
        """The device state was made anew: nothing is computed any more."""
