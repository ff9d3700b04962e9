"""Prompt lookup: what followed the last tokens where they occurred before, in the prompt or in the output.

The idea is A. Saxena's "prompt lookup decoding" (2023), as in vLLM's `ngram` method. Summaries, edits, code and answers
over documents copy long pieces; there it needs no model and finds most of them.

    tokens   … the cat sat on the mat … and the cat
                        ^^^^^^^^^^^                  the longest match of the last tokens goes on like this
"""

from __future__ import annotations

from engine.requests.sequence import Sequence

MOST_CANDIDATES = 4  # latest places of the last tokens that are compared


class _History:
    """Tokens of one sequence, and where each run of `shortest` of them stands."""

    def __init__(self, shortest: int) -> None:
        self.tokens: list[int] = []
        self._shortest = shortest
        self._places: dict[tuple[int, ...], list[int]] = {}  # run -> indices behind it, ascending

    def extend(self, tokens: list[int]) -> None:
        """Add tokens. A run is entered once something follows it."""
        known, size, places = self.tokens, self._shortest, self._places
        first = max(len(known), size)
        known += tokens
        for index in range(first, len(known)):
            run = tuple(known[index - size : index])
            found = places.get(run)
            if found is None:
                places[run] = [index]
            else:
                found.append(index)

    def place(self, longest: int) -> int | None:
        """Index behind the longest earlier match of the last tokens, the latest of equals; None if there is none."""
        tokens, size = self.tokens, self._shortest
        candidates = self._places.get(tuple(tokens[-size:]))
        if candidates is None:
            return None
        best, best_size = None, 0
        end = len(tokens)
        for index in reversed(candidates[-MOST_CANDIDATES:]):
            matched = size
            while matched < longest and matched < index and tokens[index - matched - 1] == tokens[end - matched - 1]:
                matched += 1
            if matched > best_size:
                best, best_size = index, matched
            if matched == longest:
                break
        return best


class NgramProposer:
    """A `Proposer`.

    Args:
        shortest, longest: tokens that must match, and more of which do not count.
        num_drafts: tokens to propose.
    """

    def __init__(self, shortest: int, longest: int, num_drafts: int) -> None:
        self._shortest, self._longest, self._num_drafts = shortest, longest, num_drafts
        self._histories: dict[Sequence, _History] = {}

    def extend(self, sequence: Sequence) -> None:
        """See `Proposer`."""
        history = self._histories.get(sequence)
        if history is None:
            history = self._histories[sequence] = _History(self._shortest)
            history.extend(list(sequence.request.prompt_token_ids))
        start = len(history.tokens) - sequence.num_prompt_tokens
        history.extend(sequence.output_token_ids[start:])

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        """See `Proposer`. A match that reaches into the last tokens goes on by itself: text in a loop is foreseen."""
        tokens = self._histories[sequence].tokens
        place = self._histories[sequence].place(self._longest)
        if place is None:
            return ()
        drafts = tokens[place : place + self._num_drafts]
        period = len(tokens) - place
        while len(drafts) < self._num_drafts:
            drafts.append(drafts[-period])
        return tuple(drafts)

    def forget(self, sequence: Sequence) -> None:
        """See `Proposer`."""
        self._histories.pop(sequence, None)
