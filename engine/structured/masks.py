"""`MaskFiller`: the bits of one step, for all rows that follow a grammar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor

from engine.requests.request import Request
from engine.structured.matcher import GrammarMatcher, MatcherState

WORD = 32  # tokens per int32 of a mask


@dataclass(frozen=True)
class MaskedRow:
    """One row that needs a mask.

    Attributes:
        index: of the row in the step.
        matcher: of its sequence, all tokens read so far accepted.
        request: its request.
        drafts: guesses of its next tokens; the row after each of them is one more row of the mask.
    """

    index: int
    matcher: GrammarMatcher
    request: Request
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True)
class DeadEnd:
    """A row for which no token is left. Its mask is all ones: what it samples must not be used.

    Attributes:
        index: of the row in the step.
        complete: True if its text is complete as it stands.
        error: why nothing is left, if it is not.
    """

    index: int
    complete: bool
    error: str


def mask_width(vocab_size: int) -> int:
    """W, int32 words of a mask row."""
    return -(-vocab_size // WORD)


def bits_of(token_ids: Iterable[int], width: int) -> np.ndarray:
    """int32[width] with a bit for each token id; ids beyond it are left out."""
    flags = np.zeros(width * WORD, np.uint8)
    ids = np.fromiter(token_ids, np.int64)
    flags[ids[(ids >= 0) & (ids < len(flags))]] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


class MaskFiller:
    """Fills masks, many rows at a time in threads of llguidance, off the interpreter's lock.

    Args:
        vocab_size: V of the model.
        num_tokens: of the grammars' tokenizer, at least V.
        eos_token_ids: ids that the grammars allow where a text is complete.
    """

    def __init__(self, vocab_size: int, num_tokens: int, eos_token_ids: Sequence[int]) -> None:
        self.width = mask_width(vocab_size)
        self._full_width = mask_width(num_tokens)
        self._exists = bits_of(range(vocab_size), self.width)
        self._no_eos = ~bits_of(eos_token_ids, self.width)
        self._threads = LLExecutor()

    def fill(self, rows: Sequence[MaskedRow], num_rows: int) -> tuple[np.ndarray, list[DeadEnd]]:
        """The masks of a step.

        A row allows what its grammar allows, less what the request forbids: ids outside allowed_token_ids, bad words of
        one token, and the end-of-sequence ids where the text is not complete or the request ignores them.

        Args:
            rows: those that follow a grammar.
            num_rows: S, of the step's bucket.

        Returns:
            int32[S, W] with a bit per token, all ones in the other rows, and the rows for which nothing is left. A new
            array each time: the device may read it in place.
        """
        full = np.full((num_rows, self._full_width), -1, np.int32)
        if len(rows) == 1:
            rows[0].matcher.fill(full[rows[0].index])
        else:
            pairs = [(row.matcher.live, row.index) for row in rows]
            self._threads.unsafe_compute_mask_ptr(pairs, full.ctypes.data, full.shape[1] * 4, num_rows)
        mask = full if self._full_width == self.width else np.ascontiguousarray(full[:, : self.width])
        dead = [end for row in rows if (end := self._restrict(row, mask[row.index])) is not None]
        for end in dead:
            mask[end.index] = -1
        ended = {end.index for end in dead}
        for row in rows:
            if row.drafts and row.index not in ended:
                self._fill_drafts(row, mask)
        return mask, dead

    def _fill_drafts(self, row: MaskedRow, mask: np.ndarray) -> None:
        """The rows after each draft, as far as the drafts follow the grammar: what is sampled behind one that does not
        is never used. The matcher stays where it is.
        """
        matcher, accepted = row.matcher, 0
        for place, draft in enumerate(row.drafts):
            allowed = (mask[row.index + place, draft // WORD] >> (draft % WORD)) & 1
            if not allowed or draft in row.request.eos_token_ids:
                break
            matcher.accept((draft,))
            accepted += 1
            if matcher.state is not MatcherState.OPEN:
                break
            following = MaskedRow(row.index + place + 1, matcher, row.request)
            full = np.full(self._full_width, -1, np.int32)
            matcher.fill(full)
            mask[following.index] = full[: self.width]
            if self._restrict(following, mask[following.index]) is not None:
                mask[following.index] = -1
                break
        if accepted:
            matcher.rollback(accepted)

    def _restrict(self, row: MaskedRow, mask: np.ndarray) -> DeadEnd | None:
        """Take out what the request forbids, in place."""
        matcher, request = row.matcher, row.request
        state = matcher.state
        if state is MatcherState.FAILED:
            return DeadEnd(row.index, False, matcher.error)
        if state is MatcherState.COMPLETE:
            return DeadEnd(row.index, True, "")
        mask &= self._exists
        complete = matcher.is_accepting
        # A grammar may demand the very text of an end token, which would end the completion instead.
        if not complete or not request.eos_token_ids:
            mask &= self._no_eos
        params = request.params
        if params.allowed_token_ids is not None:
            mask &= bits_of(params.allowed_token_ids, self.width)
        banned = [word[0] for word in request.bad_word_ids if len(word) == 1]
        if banned:
            mask &= ~bits_of(banned, self.width)
        if mask.any():
            return None
        return DeadEnd(row.index, complete, "no token is left that the grammar and the other parameters both allow")
