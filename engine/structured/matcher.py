"""`GrammarMatcher`: where one completion stands in its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np
from llguidance import LLMatcher

# Reasons of llguidance for which a text is complete; any other one is a fault.
_COMPLETE = ("NoExtension", "NoExtensionBias", "EndOfSentence", "MaxTokensTotal", "MaxTokensParser")


class MatcherState(Enum):
    """What may follow."""

    OPEN = "open"  # more text
    COMPLETE = "complete"  # nothing but the end
    FAILED = "failed"  # the grammar cannot be followed any more: `GrammarMatcher.error` says why


class GrammarMatcher:
    """One completion's walk through a grammar.

    It depends on the completion's tokens only, so it outlives preemption and recomputation. Not thread-safe.

    Args:
        template: a compiled grammar at its start, shared and never advanced; copied at first use.
    """

    def __init__(self, template: LLMatcher) -> None:
        self._template = template
        self._copy: LLMatcher | None = None

    @property
    def live(self) -> LLMatcher:
        """llguidance's matcher, of this completion alone."""
        if self._copy is None:
            self._copy = self._template.deep_copy()
        return self._copy

    def accept(self, tokens: Sequence[int]) -> bool:
        """Go on by sampled tokens, an end-of-sequence token included. False: the grammar forbids one; the matcher has
        failed for good.
        """
        return self.live.consume_tokens(list(tokens))

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens (drafts that were rejected).

        Raises:
            ValueError: there are not so many, or the matcher has failed.
        """
        if not self.live.rollback(count):
            raise ValueError(f"cannot take back {count} tokens: {self.error}")

    def fill(self, row: np.ndarray) -> None:
        """Write which tokens may follow: bit t of the row is 1 if token t may. After a failure nothing but the end may.

        Args:
            row: int32[W], contiguous, a bit for each of the grammar's tokens.
        """
        self.live.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    @property
    def is_accepting(self) -> bool:
        """True if the text so far is complete, whether or not more may follow."""
        return self.live.is_accepting()

    @property
    def state(self) -> MatcherState:
        """What may follow."""
        live = self.live
        if not live.is_stopped():
            return MatcherState.OPEN
        if not live.is_error() and live.stop_reason() in _COMPLETE:
            return MatcherState.COMPLETE
        return MatcherState.FAILED

    @property
    def error(self) -> str:
        """Why it failed, in one line."""
        live = self.live
        reason = live.get_error().replace("<non-verbose/>", "").strip() or str(live.stop_reason())
        return " ".join(reason.split())
