"""Suffix decoding: what most often followed the last tokens, in the sequence itself and in outputs of the past.

After G. Oliaro et al., "SuffixDecoding" (2024, arXiv 2411.04975), as vLLM's `suffix` method. Agents and pipelines ask
much alike again and again; then not only the prompt but earlier answers are worth copying from.

The longest match of the last tokens is followed for as long as it holds: the places where it stands are kept, and
each new token leaves those that go on with it. Where none is left they are looked up anew (`History`, `Corpus`): so a
suffix tree is walked that is never built. The draft takes at each token what most of the places go on with.

    places    … a b c d e …        count of what follows "a b c": d 2, x 1
              … a b c d f …        draft d (2/3), then e (1/3)
              … a b c x …

A long match deserves a long draft: at most `spec_factor` times as many tokens as match. The draft ends where the
product of the shares falls below `least_prob`. Of the two drafts, that of the sequence and that of the past, the
one goes whose shares promise more right tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Several
from dataclasses import dataclass

from engine.requests.sequence import Sequence
from engine.speculative.corpus import BORDER, RUN, Corpus
from engine.speculative.history import History, continued

SHORTEST = 1  # tokens that must match within a sequence
MOST_PLACES = 8  # of a match that are followed


@dataclass(frozen=True)
class SuffixOptions:
    """How far to believe.

    Attributes:
        num_drafts: most tokens to propose.
        max_depth: tokens of a match beyond which it is not better.
        spec_factor: most drafts for each token that matches.
        least_prob: least product of the shares.
        most_outputs: outputs of the past that are kept; 0 = none.
    """

    num_drafts: int
    max_depth: int
    spec_factor: float
    least_prob: float
    most_outputs: int


class _Trail:
    """One sequence: its tokens, and the places that match its last ones, in itself and in the past.

    Attributes:
        history: of the sequence.
        places, matched: indices behind what matches the last `matched` tokens; [] if nothing
            does, or nobody has looked.
        past, past_matched: likewise slots of `corpus`.
        corpus: that the last look-up was in. Another may have taken its place meanwhile.
    """

    __slots__ = ("corpus", "history", "matched", "num_prompt_tokens", "past", "past_matched", "places")

    def __init__(self, prompt: Several[int]) -> None:
        self.history = History(SHORTEST)
        self.history.extend(prompt)
        self.num_prompt_tokens = len(prompt)
        self.places: list[int] = []
        self.matched = 0
        self.past: list[int] = []
        self.past_matched = 0
        self.corpus: Corpus | None = None


class SuffixProposer:
    """A `Proposer`. Sequences of different cache salts share nothing."""

    def __init__(self, options: SuffixOptions) -> None:
        self._options = options
        self._trails: dict[Sequence, _Trail] = {}
        self._corpora: dict[str | None, Corpus] = {}  # by cache salt; those that hold an output
        self._salts: deque[str | None] = deque()  # of each output that is kept, oldest first

    def extend(self, sequence: Sequence) -> None:
        """See `Proposer`."""
        trail = self._trails.get(sequence)
        if trail is None:
            trail = self._trails[sequence] = _Trail(sequence.request.prompt_token_ids)
        history, places = trail.history, trail.places
        tokens = history.tokens
        new = sequence.output_token_ids[len(tokens) - trail.num_prompt_tokens :]
        history.extend(new)
        if places:
            for token in new:
                if len(places) > 1:
                    places = [place + 1 for place in places if tokens[place] == token]
                elif places:
                    places = [places[0] + 1] if tokens[places[0]] == token else []
            trail.places, trail.matched = places, trail.matched + len(new)
        if trail.corpus is not None and trail.past:
            trail.past = trail.corpus.follow(trail.past, new)
            trail.past_matched += len(new)

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        """See `Proposer`."""
        trail, options = self._trails[sequence], self._options
        history = trail.history
        drafts: tuple[int, ...] = ()
        right = 0.0
        if not trail.places and history.latest:
            trail.places, trail.matched = history.longest_matches(options.max_depth, MOST_PLACES)
        if trail.places:
            limit = self._limit(trail.matched)
            if len(trail.places) == 1:
                drafts = continued(history.tokens, trail.places[0], limit)
                right = float(limit)
            else:
                drafts, right = self._most_frequent(history.tokens, trail.places, limit, len(history.tokens))
        if right < options.num_drafts and self._corpora:
            corpus = self._corpora.get(sequence.request.cache_salt)
            if corpus is not None:
                return self._past(trail, corpus, drafts, right)
        return drafts

    def forget(self, sequence: Sequence) -> None:
        """See `Proposer`. What it said is kept for others."""
        self._trails.pop(sequence, None)
        salt, output = sequence.request.cache_salt, sequence.output_token_ids
        if self._options.most_outputs == 0 or len(output) <= RUN:
            return
        corpus = self._corpora.get(salt)
        if corpus is None:
            corpus = self._corpora[salt] = Corpus()
        for _ in range(corpus.add(output)):
            self._salts.remove(salt)
        self._salts.append(salt)
        if len(self._salts) > self._options.most_outputs:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        salt = self._salts.popleft()
        corpus = self._corpora[salt]
        corpus.drop_oldest()
        if corpus.num_outputs == 0:
            del self._corpora[salt]

    def _past(self, trail: _Trail, corpus: Corpus, drafts: tuple[int, ...], right: float) -> tuple[int, ...]:
        """The draft of the past, if it promises more right tokens than the sequence's own."""
        tokens = trail.history.tokens
        if len(tokens) >= RUN and (not trail.past or trail.corpus is not corpus):
            trail.corpus = corpus
            trail.past, trail.past_matched = corpus.longest_matches(tokens, self._options.max_depth, MOST_PLACES)
        if not trail.past:
            return drafts
        found, promised = self._most_frequent(
            corpus.tokens, trail.past, self._limit(trail.past_matched), corpus.num_slots
        )
        return found if promised > right else drafts

    def _limit(self, matched: int) -> int:
        options = self._options
        return min(options.num_drafts, int(options.spec_factor * min(matched, options.max_depth)))

    def _most_frequent(
        self, tokens: Several[int], places: list[int], limit: int, end: int
    ) -> tuple[tuple[int, ...], float]:
        """What most of the places go on with, token by token, and the expected number of right tokens.

        Args:
            tokens: that the places are indices of; a border ends what stands before it.
            places: latest first: of tokens that are as frequent as each other the latest goes.
            limit: most tokens.
            end: number of tokens.
        """
        drafts: list[int] = []
        share, right = 1.0, 0.0
        least = self._options.least_prob
        while limit and places:
            follow = [tokens[place] for place in places]
            token, count = follow[0], follow.count(follow[0])
            if 2 * count < len(follow):  # another may be more frequent, and as frequent is not enough
                token = max(follow, key=follow.count)
                count = follow.count(token)
            share *= count / len(follow)
            if token == BORDER or share < least:
                break
            drafts.append(token)
            right += share
            limit -= 1
            if limit:
                places = [place + 1 for place in places if tokens[place] == token and place + 1 < end]
        return tuple(drafts), right
