"""The engines of `tests/engine`, shared here as there, and compilers of grammars."""

from __future__ import annotations

import pytest

from engine.engine import Engine
from engine.structured.compiler import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from tests.engine.conftest import MakeEngine, compilation_cache, make_engine, shelf
from tests.engine.helpers import TINY, VOCAB
from tests.structured.helpers import SETTINGS
from tests.text.conftest import byte_level, sentence_piece, word_piece

__all__ = ["byte_level", "compilation_cache", "make_engine", "sentence_piece", "shelf", "word_piece"]

EOS = 2


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer of the tiny golden models."""
    return Tokenizer.from_directory(TINY / "llama")


@pytest.fixture(scope="session")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    """Grammars over the tiny golden models' vocabulary."""
    return GrammarCompiler(tokenizer, VOCAB, (EOS,))


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    """The engine of these tests."""
    return make_engine(**SETTINGS)
