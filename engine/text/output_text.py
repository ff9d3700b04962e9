"""`OutputText`: the text of one completion as it grows, from token ids to what may be sent."""

from __future__ import annotations

from collections.abc import Sequence

from engine.sampling_params import SamplingParams
from engine.text.detokenizer import make_detokenizer
from engine.text.stop import StopMatch, find_stop
from engine.text.tokenizer import Tokenizer


class OutputText:
    """Detokenization and stop strings of one completion.

    Text that was given out is never taken back: while stop strings are searched, the last `longest stop - 1`
    characters are held back, because a stop string may begin there. Nothing is held back without stop strings, or if
    they belong to the output.

        text seen   [ given out ............ | held back | new piece ]
                                             ^---- tail -^
        a stop string that ends in the new piece begins in the tail or after it

    Attributes:
        stop_match: the stop string that ended the text, or None.
        num_tokens: tokens that the text is made of; after a match, up to the token that completed it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self.stop_match: str | None = None
        self.num_tokens = 0
        self._detokenizer = make_detokenizer(
            tokenizer, prompt_token_ids, params.skip_special_tokens, params.spaces_between_special_tokens
        )
        self._stops = tuple(params.stop or ())
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._tail_length = max((len(stop) for stop in self._stops), default=1) - 1
        self._tail = ""
        self._finished = False
        self._given: list[str] = []
        self._fresh: list[str] = []  # those of them that were not taken yet

    @property
    def text(self) -> str:
        """Everything given out so far."""
        if len(self._given) > 1:
            self._given = ["".join(self._given)]
        return self._given[0] if self._given else ""

    def take(self) -> str:
        """What was given out since the last call."""
        if not self._fresh:
            return ""
        fresh, self._fresh = self._fresh, []
        return fresh[0] if len(fresh) == 1 else "".join(fresh)

    def add(self, token_id: int) -> str:
        """Add one sampled token that is not the last; as `push`, for which most tokens need not pay."""
        if self._finished:
            return ""
        self.num_tokens += 1
        piece = self._detokenizer.push(token_id)
        if piece and self._stops:
            piece = self._advance(piece)
            self._finished = self.stop_match is not None
        if piece:
            self._given.append(piece)
            self._fresh.append(piece)
        return piece

    def push(self, token_ids: Sequence[int], *, finished: bool = False, stop_token: bool = False) -> str:
        """Add sampled tokens.

        Args:
            token_ids: in order; may be empty. Tokens after a stop string, or after the end, are dropped.
            finished: no token will follow: what was held back comes out.
            stop_token: the last of `token_ids` is an end or stop token that ended the sequence; it has no text unless
                `include_stop_str_in_output`.

        Returns:
            The new text that may be sent now.
        """
        silent = len(token_ids) - 1 if stop_token and not self._include_stop else len(token_ids)
        new = "".join([self.add(token_id) for token_id in token_ids[:silent]])
        if self._finished:
            return new
        self.num_tokens += len(token_ids) - silent
        if finished:
            self._finished = True
            rest = self._advance(self._detokenizer.finish())
            if self.stop_match is None and not self._include_stop:
                rest += self._tail
            if rest:
                self._given.append(rest)
                self._fresh.append(rest)
                new += rest
        return new

    def _advance(self, piece: str) -> str:
        """Search the new piece; returns what may be sent."""
        if not self._stops:
            return piece
        seen = len(self._tail)
        window = self._tail + piece
        match = find_stop(window, seen, self._stops) if self.num_tokens > self._min_tokens else None
        first_unsent = seen if self._include_stop else 0
        if match is not None:
            return self._end_at(match, window, first_unsent)
        keep = min(len(window), self._tail_length)
        self._tail = window[len(window) - keep :]
        return piece if self._include_stop else window[: len(window) - keep]

    def _end_at(self, match: StopMatch, window: str, first_unsent: int) -> str:
        self.stop_match = match.stop
        return window[first_unsent : match.end if self._include_stop else match.start]
