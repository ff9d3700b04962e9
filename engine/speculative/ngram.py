"""Prompt lookup: what followed the last tokens where they occurred before, in the prompt or in the output.

The idea is A. Saxena's "prompt lookup decoding" (2023), as in vLLM's `ngram` method. Summaries, edits, code and answers
over documents copy long pieces; there it needs no model and finds most of them.

    tokens   … the cat sat on the mat … and the cat
                        ^^^^^^^^^^^                  the longest match of the last tokens goes on like this
"""

from __future__ import annotations

from engine.requests.sequence import Sequence
from engine.speculative.history import History, continued

MOST_PLACES = 4  # latest places of the last tokens that are compared


class NgramProposer:
    """A `Proposer`.

    Args:
        shortest, longest: tokens that must match, and more of which do not count.
        num_drafts: tokens to propose.
    """

    def __init__(self, shortest: int, longest: int, num_drafts: int) -> None:
        self._shortest, self._longest, self._num_drafts = shortest, longest, num_drafts
        self._histories: dict[Sequence, History] = {}

    def extend(self, sequence: Sequence) -> None:
        """See `Proposer`."""
        history = self._histories.get(sequence)
        if history is None:
            history = self._histories[sequence] = History(self._shortest)
            history.extend(sequence.request.prompt_token_ids)
        history.extend(sequence.output_token_ids[len(history.tokens) - sequence.num_prompt_tokens :])

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        """See `Proposer`."""
        history = self._histories[sequence]
        if not history.latest:
            return ()
        places, _ = history.longest_matches(self._longest, MOST_PLACES)
        return continued(history.tokens, places[0], self._num_drafts)

    def forget(self, sequence: Sequence) -> None:
        """See `Proposer`."""
        self._histories.pop(sequence, None)
