"""Pieces of text sum up to the text of all tokens, and no piece holds half a character."""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.detokenizer import ByteDetokenizer, Detokenizer, StreamDetokenizer, make_detokenizer
from engine.text.tokenizer import Tokenizer

TEXT = st.text(
    alphabet=st.one_of(
        st.sampled_from("the boat abc.,! \n"),
        st.sampled_from("é日本語雨🍞🎉👩\u200d👧🏳\ufe0f"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=30,
)
BYTE_LEVEL_IDS = st.lists(st.one_of(st.integers(0, 319), st.integers(130, 260), st.integers(320, 400)), max_size=40)


def pieces_of(detokenizer: Detokenizer, token_ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


def stream(tokenizer: Tokenizer, prompt: Sequence[int], token_ids: Sequence[int], skip: bool = True) -> str:
    return "".join(pieces_of(make_detokenizer(tokenizer, prompt, skip), token_ids))


def test_each_decoder_gets_its_way(byte_level: Tokenizer, sentence_piece: Tokenizer) -> None:
    assert isinstance(make_detokenizer(byte_level, [5]), ByteDetokenizer)
    assert isinstance(make_detokenizer(sentence_piece, [5]), StreamDetokenizer)


@given(token_ids=BYTE_LEVEL_IDS, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_byte_level_pieces_sum_up_for_any_tokens(byte_level: Tokenizer, token_ids: list[int], skip: bool) -> None:
    assert stream(byte_level, [], token_ids, skip) == byte_level.decode(token_ids, skip_special_tokens=skip)


@given(text=TEXT, prompt=TEXT)
@settings(max_examples=200, deadline=None)
def test_no_replacement_character_for_valid_text(
    byte_level: Tokenizer, sentence_piece: Tokenizer, text: str, prompt: str
) -> None:
    for tokenizer in (byte_level, sentence_piece):
        prompt_ids = tokenizer.encode("x" + prompt)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        allowed = "\ufffd" in text or "\ufffd" in prompt
        pieces = pieces_of(make_detokenizer(tokenizer, prompt_ids, False), token_ids)
        assert allowed or not any("\ufffd" in piece for piece in pieces)
        whole = tokenizer.decode([*prompt_ids, *token_ids])
        assert "".join(pieces) == whole[len(tokenizer.decode(prompt_ids)) :]


@given(token_ids=BYTE_LEVEL_IDS)
@settings(max_examples=200, deadline=None)
def test_stream_agrees_with_bytes_for_any_tokens(byte_level: Tokenizer, token_ids: list[int]) -> None:
    """`DecodeStream` on a byte-level tokenizer: the two implementations are each other's reference."""
    detokenizer = StreamDetokenizer(byte_level, byte_level.special_ids, [])
    expected = byte_level.decode(token_ids, skip_special_tokens=True)
    assert "".join(pieces_of(detokenizer, token_ids)) == expected or "\ufffd" * 3 in expected


@given(token_ids=st.lists(st.one_of(st.integers(0, 286), st.integers(259, 286)), max_size=40))
@settings(max_examples=300, deadline=None)
def test_broken_bytes_never_break_the_stream(sentence_piece: Tokenizer, token_ids: list[int]) -> None:
    """What surrounds broken bytes comes through; only their own replacement characters may differ."""
    text = stream(sentence_piece, [260], token_ids)
    readable = [piece for i in token_ids if i >= 259 and (piece := sentence_piece.backend.id_to_token(i)) is not None]
    assert text.replace("\ufffd", "").count("日") >= readable.count("日")
    assert text.count("boat") >= readable.count("▁boat")


def test_first_space_follows_the_prompt(sentence_piece: Tokenizer) -> None:
    prompt = sentence_piece.encode("the")
    boat = sentence_piece.token_id("▁boat")
    assert boat is not None
    assert stream(sentence_piece, prompt, [boat]) == " boat"
    assert stream(sentence_piece, [], [boat]) == "boat"


def test_character_that_begins_in_the_prompt_comes_out_whole(byte_level: Tokenizer) -> None:
    crab = [byte_level.token_id(char) for char in "ðŁ¦Ģ"]  # the four bytes of U+1F980
    assert None not in crab
    ids = [token_id for token_id in crab if token_id is not None]
    for cut in range(1, 4):
        assert stream(byte_level, [70, 71, *ids[:cut]], ids[cut:]) == "\U0001f980"


def test_replacement_character_of_the_prompt_is_not_output(sentence_piece: Tokenizer) -> None:
    """U+FFFD at the prompt's end: the stream holds it back with what may become a character, but it is whole."""
    prompt, output = sentence_piece.encode("the \ufffd"), sentence_piece.encode("boat", False)
    assert sentence_piece.decode([*prompt, *output], skip_special_tokens=True) == "the \ufffd boat"
    assert stream(sentence_piece, prompt, output) == " boat"
    assert stream(sentence_piece, prompt, []) == ""


def test_incomplete_bytes_are_held_back_and_come_out_at_the_end(byte_level: Tokenizer) -> None:
    ids = [token_id for char in "ðŁ" if (token_id := byte_level.token_id(char)) is not None]
    detokenizer = make_detokenizer(byte_level, [70])
    assert [detokenizer.push(token_id) for token_id in ids] == ["", ""]
    assert detokenizer.finish() == byte_level.decode(ids)


def test_special_tokens_are_shown_or_skipped(byte_level: Tokenizer, sentence_piece: Tokenizer) -> None:
    assert stream(byte_level, [70], [70, 2, 71]) == "de"
    assert stream(byte_level, [70], [70, 2, 71], skip=False) == "d<|im_end|>e"
    boat = sentence_piece.token_id("boat")
    assert boat is not None
    assert stream(sentence_piece, [260], [boat, 2, 2, boat]) == "boatboat"
    assert stream(sentence_piece, [260], [boat, 2, boat], skip=False) == "boat</s>boat"


def test_spaces_between_special_tokens(word_piece: Tokenizer) -> None:
    prompt, output = [3, 4], [1, 2, 1, 4, 5]
    spaced = make_detokenizer(word_piece, prompt, skip_special_tokens=False, spaces_between_special_tokens=True)
    glued = make_detokenizer(word_piece, prompt, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert "".join(pieces_of(spaced, output)) == " [A] [B] [A] boats"
    assert "".join(pieces_of(glued, output)) == " [A][B][A] boats"


def test_invalid_prefix_recovers_without_losing_text(sentence_piece: Tokenizer) -> None:
    """Byte 61 alone is "a"; with the broken byte E4 after it, `ByteFallback` turns both to replacement characters."""
    a, broken, boat = (sentence_piece.token_id(piece) for piece in ("<0x61>", "<0xE4>", "boat"))
    assert a is not None and broken is not None and boat is not None
    detokenizer = make_detokenizer(sentence_piece, sentence_piece.encode("the"))
    pieces = pieces_of(detokenizer, [a, broken, boat, boat])
    assert pieces == ["a", "", "\ufffdboat", "boat", ""]


@pytest.mark.parametrize("name", ["byte_level", "sentence_piece"])
def test_a_flood_of_broken_bytes_costs_linear_time(name: str, request: pytest.FixtureRequest) -> None:
    """`DecodeStream` alone decodes all that is pending at each step: 20000 tokens would take minutes."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    broken = tokenizer.token_id("<0xE4>") if name == "sentence_piece" else tokenizer.token_id("ä")
    assert broken is not None
    begin = time.perf_counter()
    text = stream(tokenizer, [70], [broken] * 20000)
    assert time.perf_counter() - begin < 5.0
    assert text == "\ufffd" * 20000
