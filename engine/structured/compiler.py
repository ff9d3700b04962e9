"""`GrammarCompiler`: compiled grammars by their parameters, made in threads of their own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.errors import InvalidRequestError
from engine.structured.grammar import grammar_text
from engine.structured.matcher import GrammarMatcher, MatcherState
from engine.structured.params import StructuredOutputsParams, refuse
from engine.text.tokenizer import Tokenizer

CACHE_SIZE = 256  # grammars; a compiled one takes some 100 kB, the largest some MB
COMPILE_THREADS = 2


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps those used last. Safe to use from several threads.

    Building llguidance's view of the vocabulary holds the interpreter for 0.3 s (49152 tokens) or more, so it is done
    when the compiler is made, at the engine's start; compiling a grammar does not hold it.

    Args:
        tokenizer: of the engine.
        vocab_size: V of the model. Ids from the tokenizer's own size up to V are never allowed by a grammar.
        eos_token_ids: ids that end a text; all are allowed where a text is complete. If empty, the tokenizer's own.

    Attributes:
        vocab_size: V of the model.
        num_tokens: bits of a mask row that llguidance writes, at least V.
        unsupported: why no grammar can be used with this tokenizer, or None.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.num_tokens = max(vocab_size, tokenizer.vocab_size)
        self.unsupported: str | None = None
        self.eos_token_ids = tuple(eos_token_ids) or _own_eos(tokenizer)
        self._added = {text: token for token, text in tokenizer.added_tokens.items()}
        # Messages are for users: without the parser's insides, and with nothing of another request.
        self._limits = LLParserLimits(verbose_errors=False)
        self._tokens = self._build(tokenizer)
        self._cache: OrderedDict[StructuredOutputsParams, Future[LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="quire-grammar")

    def _build(self, tokenizer: Tokenizer) -> LLTokenizer | None:
        if not self.eos_token_ids:
            self.unsupported = "this model has no end-of-sequence token"
            return None
        try:
            return LLTokenizer(tokenizer.backend.to_str(), n_vocab=self.num_tokens, eos_token=list(self.eos_token_ids))
        except ValueError as error:
            self.unsupported = f"its tokenizer cannot be used with grammars: {error}"
            return None

    def submit(self, params: StructuredOutputsParams) -> Future[LLMatcher]:
        """Compile in another thread; at once if the grammar is known.

        The future raises InvalidRequestError if the grammar is invalid, too large, cannot be satisfied, or uses what is
        not supported. Faults are not kept.
        """
        with self._lock:
            future = self._cache.get(params)
            if future is not None:
                self._cache.move_to_end(params)
                return future
            future = self._pool.submit(self._compile, params)
            self._cache[params] = future
            if len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        future.add_done_callback(lambda done: self._forget_fault(params, done))
        return future

    def _forget_fault(self, params: StructuredOutputsParams, future: Future[LLMatcher]) -> None:
        if future.cancelled() or future.exception() is not None:
            with self._lock:
                if self._cache.get(params) is future:
                    del self._cache[params]

    def prepare(self, every: Iterable[StructuredOutputsParams | None]) -> None:
        """Compile several grammars, and wait for them. None is nothing to do.

        Raises:
            InvalidRequestError: of the first that is at fault.
        """
        for future in [self.submit(params) for params in dict.fromkeys(every) if params is not None]:
            future.result()

    def matcher(self, params: StructuredOutputsParams) -> GrammarMatcher:
        """A matcher at the start of a grammar. At once if the grammar was compiled before.

        Raises:
            InvalidRequestError: as `submit`.
        """
        return GrammarMatcher(self.submit(params).result())

    def _compile(self, params: StructuredOutputsParams) -> LLMatcher:
        if self._tokens is None:
            raise refuse(f"{self.unsupported}.")
        try:
            text = grammar_text(params, self._added.get)
        except InvalidRequestError:
            raise
        except ValueError as error:
            raise refuse(f"the {params.kind} is invalid: {error}.") from None
        template = LLMatcher(self._tokens, text, log_level=0, limits=self._limits)
        # The first mask tells whether any text satisfies the grammar, and warms what all copies share.
        matcher = GrammarMatcher(template)
        if not template.is_error():
            matcher.fill(np.zeros(-(-self.num_tokens // 32), np.int32))
        if template.is_error():
            message = " ".join(template.get_error().replace("<non-verbose/>", "").split())
            raise refuse(f"the {params.kind} cannot be used: {message}.")
        if matcher.state is MatcherState.FAILED:
            raise refuse(f"no text satisfies the {params.kind}.")
        return template


def _own_eos(tokenizer: Tokenizer) -> tuple[int, ...]:
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
