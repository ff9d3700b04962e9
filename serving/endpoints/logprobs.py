"""Logprobs as the API shows them: two forms, one for completions and one for chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.outputs import TokenLogprobs
from engine.text.tokenizer import Tokenizer

FLOOR = -9999.0  # JSON has no -Infinity; vLLM's number for it


@dataclass(frozen=True)
class TokenNames:
    """How tokens are written.

    Attributes:
        tokenizer: for the bytes of tokens; None = only ids can be shown.
        as_ids: write `token_id:17` instead of text, which may be the same for two tokens.
    """

    tokenizer: Tokenizer | None
    as_ids: bool = False

    def text(self, token_id: int, decoded: str | None = None) -> str:
        """The name of a token."""
        if self.as_ids or self.tokenizer is None:
            return f"token_id:{token_id}"
        return decoded if decoded is not None else self.tokenizer.token_text(token_id)

    def bytes(self, token_id: int, name: str) -> list[int]:
        """UTF-8 bytes: the token's own where they are known, those of its name elsewhere."""
        vocabulary = None if self.tokenizer is None or self.as_ids else self.tokenizer.byte_vocabulary
        return list(name.encode("utf-8", "replace") if vocabulary is None else vocabulary[token_id])


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR)


def _top(candidates: TokenLogprobs, count: int) -> list[int]:
    """The ids of the `count` most probable candidates, best first; -1 = all that there are."""
    ordered = sorted(candidates, key=lambda token: (candidates[token].rank or 0, token))
    if count < 0:
        return ordered
    return [token for token in ordered if (candidates[token].rank or 0) <= count][:count]


def completion_logprobs(
    tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None], top: int, names: TokenNames, offset: int
) -> tuple[dict[str, Any], int]:
    """The `logprobs` object of a completion.

    Args:
        tokens: the tokens to describe.
        logprobs: their candidates; None for the first token of a prompt.
        top: how many candidates were asked for; the token itself is always shown.
        names: how to write tokens.
        offset: characters before the first token.

    Returns:
        The object, and the characters up to the end of the last token.
    """
    texts: list[str] = []
    chosen: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token, candidates in zip(tokens, logprobs, strict=True):
        known = None if candidates is None else candidates.get(token)
        text = names.text(token, None if known is None else known.decoded_token)
        offsets.append(offset)
        offset += len(text)
        texts.append(text)
        chosen.append(None if known is None else _finite(known.logprob))
        if candidates is None:
            tops.append(None)
            continue
        shown = dict.fromkeys([*_top(candidates, top), token] if top else [])
        tops.append(
            {
                names.text(other, candidates[other].decoded_token): _finite(candidates[other].logprob)
                for other in shown
                if other in candidates
            }
        )
    return {"tokens": texts, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}, offset


def chat_logprobs(
    tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int, names: TokenNames
) -> dict[str, Any]:
    """The `logprobs` object of a chat answer."""

    def entry(token: int, candidates: TokenLogprobs) -> dict[str, Any]:
        known = candidates[token]
        name = names.text(token, known.decoded_token)
        return {"token": name, "logprob": _finite(known.logprob), "bytes": names.bytes(token, name)}

    content = [
        {**entry(token, candidates), "top_logprobs": [entry(other, candidates) for other in _top(candidates, top)]}
        for token, candidates in zip(tokens, logprobs, strict=True)
    ]
    return {"content": content}


def prompt_logprobs(logprobs: Sequence[TokenLogprobs | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: per position, token id → logprob, rank and text."""
    if logprobs is None:
        return None
    return [
        None
        if candidates is None
        else {
            str(token): {"logprob": _finite(c.logprob), "rank": c.rank, "decoded_token": c.decoded_token}
            for token, c in candidates.items()
        }
        for candidates in logprobs
    ]
