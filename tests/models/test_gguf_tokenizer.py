"""Tokenizers rebuilt from GGUF metadata give the ids of the tokenizer.json that they were made of."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.errors import UnsupportedModelError, WeightsError
from models.loading.gguf_file import GgufFile
from models.loading.gguf_tokenizer import PRE_TOKENIZERS, GgufTokenizer, gguf_tokenizer

TINY_LLAMA = Path(__file__).parent.parent / "golden" / "tiny" / "llama"
TEMPLATE = "{{ messages }}"


def byte_level_metadata(pre: str | None = "gpt-2") -> dict[str, Any]:
    """What llama.cpp's converter writes for the golden 320-token tokenizer."""
    model = json.loads((TINY_LLAMA / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    return metadata if pre is None else metadata | {"tokenizer.ggml.pre": pre}


def sentence_piece_metadata() -> dict[str, Any]:
    singles = ["▁", *"abehot!"]
    words = {"▁boat": -7.0, "oa": -9.0, "th": -1.0, "▁b": -2.0, "▁th": -3.0, "oat": -6.0, "at": -4.0, "▁the": -5.0}
    words["aa"] = -8.0
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *singles]
    scores = [0.0] * 259 + list(words.values()) + [-100.0 - index for index in range(len(singles))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(singles)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def rebuild(metadata: dict[str, Any]) -> GgufTokenizer:
    return gguf_tokenizer(GgufFile(Path("m.gguf"), metadata, {}))


def texts(tokenizer: GgufTokenizer, text: str, special: bool = True) -> list[str]:
    ids = tokenizer.backend.encode(text, add_special_tokens=special).ids
    return [tokenizer.backend.id_to_token(token_id) or "" for token_id in ids]


def test_byte_level_agrees_with_transformers() -> None:
    tokenizer = rebuild(byte_level_metadata())
    golden = json.loads((TINY_LLAMA / "tokenizer_golden.json").read_text(encoding="utf-8"))
    for case in golden["cases"]:
        assert tokenizer.backend.encode(case["text"]).ids == case["ids"], case["text"]
        assert tokenizer.backend.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
    assert tokenizer.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    assert tokenizer.chat_templates == {"default": TEMPLATE}


# Written by hand from the rules of the original tokenizer.json files; ▁ stands for a space.
SPLITS = {
    "gpt-2": ["I", "'m", "▁at", "▁1234", "kg", "▁", "▁now", "...", "\n", "\n", "DON", "'", "T"],
    "smollm": ["I", "'m", "▁at", "▁", "1", "2", "3", "4", "kg", "▁", "▁now", "...", "\n", "\n", "DON", "'", "T"],
    "llama-bpe": ["I", "'m", "▁at", "▁", "123", "4", "kg", "▁", "▁now", "...\n\n", "DON", "'T"],
    "qwen2": ["I", "'m", "▁at", "▁", "1", "2", "3", "4", "kg", "▁", "▁now", "...\n\n", "DON", "'T"],
    "tekken": ["I", "'m", "▁at", "▁", "1", "2", "3", "4", "kg", "▁", "▁now", "...\n\n", "DON", "'T"],
}


@pytest.mark.parametrize("name", SPLITS)
def test_splitting_rules(name: str) -> None:
    pieces = PRE_TOKENIZERS[name].make().pre_tokenize_str("I'm at 1234kg  now...\n\nDON'T")
    assert [piece.replace("Ġ", "▁").replace("Ċ", "\n") for piece, _ in pieces] == SPLITS[name]


def test_unknown_rules_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"rule 'jina-v2-code'.*supported: default, gpt-2, smollm"):
        rebuild(byte_level_metadata("jina-v2-code"))


def test_llama3_takes_whole_words_without_merges() -> None:
    """A token that its merges do not lead to: only with `ignore_merges` is it found."""
    metadata = byte_level_metadata("llama-bpe")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zzz"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    assert texts(rebuild(metadata), "zzz", special=False) == ["zzz"]
    metadata["tokenizer.ggml.pre"] = "smaug-bpe"
    assert texts(rebuild(metadata), "zzz", special=False) == ["z", "z", "z"]


def test_qwen2_normalises_to_nfc() -> None:
    decomposed = "e\u0301"
    assert texts(rebuild(byte_level_metadata("qwen2")), decomposed) == texts(rebuild(byte_level_metadata("qwen2")), "é")
    assert texts(rebuild(byte_level_metadata("gpt-2")), decomposed) != texts(rebuild(byte_level_metadata("gpt-2")), "é")


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("gpt-2", {}, ["a"]),
        ("llama-bpe", {}, ["<|im_start|>", "a"]),
        ("llama-bpe", {"add_bos_token": False}, ["a"]),
        ("gpt-2", {"add_bos_token": True}, ["<|im_start|>", "a"]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ["<|im_start|>", "a", "<|im_end|>"]),
        ("gpt-2", {"add_eos_token": True}, ["a", "<|im_end|>"]),
    ],
)
def test_bos_and_eos(pre: str, flags: dict[str, bool], expected: list[str]) -> None:
    tokenizer = rebuild(byte_level_metadata(pre) | {f"tokenizer.ggml.{key}": flag for key, flag in flags.items()})
    assert texts(tokenizer, "a") == expected
    assert texts(tokenizer, "a", special=False) == ["a"]


def test_control_tokens_are_special_and_user_defined_ones_only_whole() -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = rebuild(metadata)
    ids = tokenizer.backend.encode("a<think><|im_end|>").ids
    assert ids == [tokenizer.backend.token_to_id("a"), 320, 2]
    assert tokenizer.backend.decode(ids, skip_special_tokens=True) == "a<think>"


def test_named_chat_templates() -> None:
    metadata = byte_level_metadata() | {
        "tokenizer.chat_template.tool_use": "T",
        "tokenizer.chat_templates": ["tool_use"],
    }
    assert rebuild(metadata).chat_templates == {"default": TEMPLATE, "tool_use": "T"}


def test_sentence_piece() -> None:
    """Pairs merge by the score of what they make, unknown characters fall back to bytes, BOS is added by default."""
    tokenizer = rebuild(sentence_piece_metadata())
    assert texts(tokenizer, "the boat") == ["<s>", "▁the", "▁boat"]
    assert texts(tokenizer, "aaa é!", special=False) == ["▁", "aa", "a", "▁", "<0xC3>", "<0xA9>", "!"]
    assert texts(tokenizer, "oaa", special=False) == ["▁", "o", "aa"]  # aa (-8) before oa (-9)
    ids = tokenizer.backend.encode("the boat  é!").ids
    assert tokenizer.backend.decode(ids) == "the boat  é!"
    bare = rebuild(sentence_piece_metadata() | {"tokenizer.ggml.add_space_prefix": False})
    assert texts(bare, "boat", special=False) == ["b", "oat"]
    assert bare.backend.decode(bare.backend.encode(" boat").ids) == " boat"


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"tokenizer.ggml.model": "t5"}, UnsupportedModelError, "kind 't5'; supported: gpt2"),
        ({"tokenizer.ggml.tokens": []}, WeightsError, "no vocabulary"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, WeightsError, "token 'a' is in the vocabulary twice"),
        ({"tokenizer.ggml.merges": ["q q q"]}, WeightsError, "merge 'q q q' is not two tokens"),
        ({"tokenizer.ggml.merges": ["q qqqq"]}, WeightsError, "merges do not fit"),
        ({"tokenizer.ggml.merges": None}, WeightsError, "no merges"),
        ({"tokenizer.ggml.token_type": [1]}, WeightsError, "1 token types for 320 tokens"),
        ({"tokenizer.ggml.bos_token_id": 320}, WeightsError, "bos token is 320, ids are 0 to 319"),
    ],
)
def test_faults(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        rebuild(byte_level_metadata() | changes)
