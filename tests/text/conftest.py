"""Tokenizers of both kinds: byte-level BPE, and SentencePiece's BPE with byte fallback."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from engine.text.tokenizer import Tokenizer

TINY_LLAMA = Path(__file__).parent.parent / "golden" / "tiny" / "llama"


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """The golden 320-token byte-level BPE; emoji and most CJK characters are several tokens."""
    return Tokenizer.from_directory(TINY_LLAMA)


@pytest.fixture(scope="session")
def sentence_piece() -> Tokenizer:
    """Llama 2's construction in small: ▁ for spaces, bytes for unknown characters, the first space stripped."""
    words = ["▁the", "▁boat", "▁a", "th", "bo", "oa", "at", "oat", "boat", "he", "the", "▁t", "▁b"]
    singles = ["▁", *"abcdehot.,!é日"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *singles, *words]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (w[:cut], w[cut:]) for w in words for cut in range(1, len(w)) if w[:cut] in vocabulary and w[cut:] in vocabulary
    ]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, {})


@pytest.fixture(scope="session")
def word_piece() -> Tokenizer:
    """A decoder that puts spaces between tokens, so that a token's text depends on its neighbours."""
    pieces = ["[UNK]", "[A]", "[B]", "the", "boat", "##s", "is", "."]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("[A]", "[B]")])
    return Tokenizer(backend, {}, {})
