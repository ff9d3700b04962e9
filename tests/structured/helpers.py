"""Parameters of requests that follow grammars, and walks through grammars without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.outputs import CompletionOutput, RequestOutput
from engine.sampling_params import SamplingParams
from engine.structured.compiler import GrammarCompiler
from engine.structured.masks import mask_width
from engine.structured.matcher import GrammarMatcher, MatcherState
from engine.structured.params import StructuredOutputsParams
from engine.text.tokenizer import Tokenizer

SETTINGS = {"max_model_len": 512}


def following(most: int = 400, **fields: Any) -> SamplingParams:
    """Parameters of a request that follows a grammar; those that are not of the grammar come as `sampling`."""
    sampling = {"max_tokens": most, "temperature": 1.0, **fields.pop("sampling", {})}
    return SamplingParams(structured_outputs=StructuredOutputsParams(**fields), **sampling)


def free(**fields: Any) -> SamplingParams:
    """Parameters of a request without a grammar."""
    return SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **fields})


def only(outputs: Sequence[RequestOutput]) -> CompletionOutput:
    [output] = outputs
    assert output.error is None
    return output.outputs[0]


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
