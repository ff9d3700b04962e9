"""Walks through grammars without a model: each step takes one of the tokens that the mask allows."""

from __future__ import annotations

import numpy as np

from engine.structured.compiler import GrammarCompiler
from engine.structured.masks import mask_width
from engine.structured.matcher import GrammarMatcher, MatcherState
from engine.structured.params import StructuredOutputsParams
from engine.text.tokenizer import Tokenizer


def allowed(matcher: GrammarMatcher, num_tokens: int) -> list[int]:
    """The tokens that may follow."""
    row = np.zeros(mask_width(num_tokens), np.int32)
    matcher.fill(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def follows(compiler: GrammarCompiler, params: StructuredOutputsParams, tokenizer: Tokenizer, text: str) -> bool:
    """Whether a grammar accepts a whole text, token by token."""
    matcher = compiler.matcher(params)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.accept(ids) and matcher.is_accepting


def walk(compiler: GrammarCompiler, params: StructuredOutputsParams, rng: np.random.Generator, most: int) -> list[int]:
    """Random tokens until the text is complete and the end is drawn, or nothing else may follow."""
    matcher, tokens = compiler.matcher(params), []
    while len(tokens) < most and matcher.state is MatcherState.OPEN:
        token = int(rng.choice(allowed(matcher, compiler.num_tokens)))
        assert matcher.accept([token]), matcher.error
        if token in compiler.eos_token_ids:
            break
        tokens.append(token)
    return tokens
