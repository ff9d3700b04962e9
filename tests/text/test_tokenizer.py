"""Tokenizers of Hugging Face directories: ids as transformers gives them (golden), special tokens, faults."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from engine.errors import InvalidRequestError, ModelNotFoundError, UnsupportedModelError, WeightsError
from engine.text.bad_words import bad_word_ids
from engine.text.tokenizer import Tokenizer

TINY_LLAMA = Path(__file__).parent.parent / "golden" / "tiny" / "llama"
GOLDEN: dict[str, Any] = json.loads((TINY_LLAMA / "tokenizer_golden.json").read_text(encoding="utf-8"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, tmp_path / name)
    return tmp_path


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}), encoding="utf-8")


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: repr(case["text"])[:30])
def test_ids_and_text_are_those_of_transformers(byte_level: Tokenizer, case: dict[str, Any]) -> None:
    assert byte_level.encode(case["text"], add_special_tokens=False) == case["ids"]
    assert byte_level.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("chat", GOLDEN["chats"], ids=lambda chat: chat["messages"][0]["content"])
def test_chats_are_those_of_transformers(byte_level: Tokenizer, chat: dict[str, Any]) -> None:
    text = byte_level.apply_chat_template(chat["messages"], add_generation_prompt=chat["add_generation_prompt"])
    assert text == chat["text"]
    assert byte_level.encode(text, add_special_tokens=False) == chat["ids"]


def test_properties(byte_level: Tokenizer) -> None:
    assert (byte_level.vocab_size, byte_level.bos_token_id, byte_level.eos_token_id) == (320, 1, 2)
    assert byte_level.special_ids == {0, 1, 2}
    assert byte_level.special_tokens["pad_token"] == "<|endoftext|>"
    assert byte_level.token_text(2) == "<|im_end|>"
    assert byte_level.decode([1, 70, 999, 2], skip_special_tokens=True) == "d"
    vocabulary = byte_level.byte_vocabulary
    assert vocabulary is not None
    for token_id in range(320):
        assert vocabulary[token_id].decode(errors="replace") == byte_level.token_text(token_id)
    assert vocabulary[999] == b""


def test_truncation_and_padding_of_the_file_are_ignored(directory: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=100, pad_token="a", pad_id=67)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.decode(tokenizer.encode("a boat is a boat")) == "a boat is a boat"


def test_bos_is_what_tokenizer_json_says(directory: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.save(str(directory / "tokenizer.json"))
    change_config(directory, add_bos_token=False)  # transformers 5 ignores it beside a tokenizer.json
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.encode("a<|im_end|>") == [1, 67, 2]
    assert tokenizer.encode("a<|im_end|>", add_special_tokens=False) == [67, 2]


def test_special_tokens_from_dicts_the_old_map_and_added_tokens(directory: Path) -> None:
    change_config(directory, bos_token={"content": "<|endoftext|>", "lstrip": False})
    assert Tokenizer.from_directory(directory).bos_token_id == 0
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<|im_start|>"}')
    assert Tokenizer.from_directory(directory).eos_token_id == 1
    new = {"content": "<tool🍞>", "special": False, "normalized": False}
    change_config(directory, added_tokens_decoder={"320": new}, pad_token="<none>")
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.eos_token_id == 2  # a config that lists added tokens makes the old map void
    assert tokenizer.encode("a<tool🍞>b") == [67, 320, 68] and 320 not in tokenizer.special_ids
    vocabulary = tokenizer.byte_vocabulary
    assert vocabulary is not None and vocabulary[320] == "<tool🍞>".encode() == tokenizer.token_text(320).encode()
    assert tokenizer.vocab_size == 321 and tokenizer.token_id("<none>") is None


def test_named_tokens_of_the_vocabulary_become_special(directory: Path) -> None:
    change_config(directory, additional_special_tokens=["a"], unk_token="b")
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.special_ids == {0, 1, 2, 67, 68}
    assert tokenizer.decode([67, 69, 68], skip_special_tokens=True) == "c"


def test_chat_templates_by_file_and_by_name(directory: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ tools | length }}"}]
    change_config(directory, chat_template=named)
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.apply_chat_template([]) == "D"
    assert tokenizer.apply_chat_template([], tools=[{}]) == "T1"
    assert tokenizer.apply_chat_template([], chat_template="tool_use", tools=[]) == "T0"
    assert tokenizer.apply_chat_template([], chat_template="{{ bos_token }}{{ x }}", x=1) == "<|im_start|>1"
    (directory / "chat_template.jinja").write_text("F")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert Tokenizer.from_directory(directory).chat_templates == {"default": "F", "rag": "R"}
    shutil.rmtree(directory / "additional_chat_templates")
    (directory / "chat_template.jinja").unlink()
    change_config(directory, chat_template=...)
    with pytest.raises(InvalidRequestError, match="no default chat template"):
        Tokenizer.from_directory(directory).apply_chat_template([])


def test_faults_are_one_sentence_each(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"tokenizer_config.json is not valid JSON"):
        Tokenizer.load(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"tokenizer.json cannot be read"):
        Tokenizer.load(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"tokenizer.json is missing"):
        Tokenizer.load(directory)
    (directory / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UnsupportedModelError, match=r"as tokenizer.model; supported: tokenizer.json"):
        Tokenizer.load(directory)


def test_saved_and_loaded_again(directory: Path, tmp_path: Path) -> None:
    original = Tokenizer.load(directory)
    (tmp_path / "out").mkdir()
    original.save(tmp_path / "out")
    again = Tokenizer.load(tmp_path / "out")
    assert again.encode("a boat <|im_end|>🍞") == original.encode("a boat <|im_end|>🍞")
    assert (again.special_tokens, again.special_ids) == (original.special_tokens, original.special_ids)
    assert again.chat_templates == original.chat_templates


def test_a_file_is_read_as_gguf_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match="blob is truncated"):
        Tokenizer.load(tmp_path / "blob")


def test_lone_surrogates_are_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="lone surrogate"):
        byte_level.encode("a\ud800b")


def test_bad_words_with_and_without_space(byte_level: Tokenizer) -> None:
    boat, spaced = byte_level.encode("bo", False), byte_level.encode(" bo", False)
    assert len(boat) == len(spaced) == 2 and boat[0] != spaced[0]
    assert bad_word_ids(byte_level, ["  bo"]) == (tuple(boat), tuple(spaced))
    bare = byte_level.encode("é", False)
    assert byte_level.encode(" é", False) == [byte_level.token_id("Ġ"), *bare]  # the space is a token of its own
    assert bad_word_ids(byte_level, ["é", "bo"]) == (tuple(bare), tuple(boat), tuple(spaced))
    with pytest.raises(InvalidRequestError, match="must hold words"):
        bad_word_ids(byte_level, ["  "])
