"""Measures SmolLM2-135M-Instruct, read from its GGUF file, in float32, and its tokenizer."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .files import provenance, sha256, write_json, write_npz
from .measure import Measured, continuation_noise, forward, greedy_cached, measure
from .texts import CHATS, PROMPTS, TOKENIZER_CASES, TOP_LOGPROBS_PROMPT, Message, Prompt

CONTINUATION_LENGTH = 64
MIN_GAP = 2e-3
NUM_TOP = 5


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the GGUF file, with the digit splitting that the conversion loses.

    `tokenizer.ggml.pre` is "smollm": every digit is a piece of its own, then GPT-2's byte-level rule applies.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return tokenizer


def load_model(gguf: Path) -> PreTrainedModel:
    """The model of the GGUF file, dequantized to float32."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    epsilon = torch.tensor(model.config.rms_norm_eps, dtype=torch.float32)
    if epsilon != torch.tensor(1e-5, dtype=torch.float32):
        raise ValueError(f"unexpected rms_norm_eps {model.config.rms_norm_eps}")
    return model


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special: bool) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)


def _tokenizer_golden(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Text to ids and back, and rendered chats."""
    cases = []
    for text in TOKENIZER_CASES:
        ids = _encode(tokenizer, text)
        cases.append({"text": text, "ids": ids, "decoded": _decode(tokenizer, ids, skip_special=False)})
    chats = []
    for messages in CHATS:
        text = _render(tokenizer, messages)
        ids = _encode(tokenizer, text)
        chats.append({"messages": list(messages), "add_generation_prompt": True, "text": text, "ids": ids})
    return {"tokenizer_cases": cases, "chats": chats}


def _measure_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt
) -> tuple[Measured, dict[str, Any]]:
    """Greedy over a KV cache, then teacher-forced in one pass; both must choose the same tokens."""
    text = _render(tokenizer, prompt.messages) if prompt.messages else prompt.text
    continuation, logits = greedy_cached(model, _encode(tokenizer, text), CONTINUATION_LENGTH)
    measured = measure(model, _encode(tokenizer, text), continuation)
    entry = {
        "name": prompt.name,
        "text": text,
        "messages": list(prompt.messages) or None,
        "min_gap": round(measured.min_gap, 5),
        "min_gap_step": measured.min_gap_step,
        "cached_decode_noise": continuation_noise(measured, logits),
        "prompt": measured.prompt,
        "continuation": continuation,
        "continuation_text": _decode(tokenizer, continuation, skip_special=False),
        "continuation_text_without_special": _decode(tokenizer, continuation, skip_special=True),
    }
    return measured, entry


def _top_logprobs(model: PreTrainedModel, measured: Measured) -> dict[str, Any]:
    """The most likely tokens after the first token, after the last of the prompt, and inside the continuation."""
    tokens = [*measured.prompt, *measured.continuation]
    logprobs = torch.log_softmax(forward(model, tokens).double(), dim=-1)
    entries = []
    for position in (0, len(measured.prompt) - 1, len(measured.prompt) + CONTINUATION_LENGTH // 2):
        top = logprobs[position].topk(NUM_TOP + 1)
        if float(-top.values.diff().max()) < MIN_GAP:
            raise ValueError(f"the top tokens at position {position} are too close to rank")
        values = [round(value, 6) for value in top.values[:NUM_TOP].tolist()]
        entries.append({"position": position, "ids": top.indices[:NUM_TOP].tolist(), "logprobs": values})
    return {
        "prompt_name": TOP_LOGPROBS_PROMPT,
        "meaning": "position p: the distribution after token[p], for token[p + 1]",
        "positions": entries,
    }


def _arrays(measured: Sequence[Measured]) -> dict[str, np.ndarray]:
    arrays = {}
    for index, one in enumerate(measured):
        arrays[f"prompt_{index}"] = np.array(one.prompt, dtype=np.int32)
        arrays[f"continuation_{index}"] = np.array(one.continuation, dtype=np.int32)
        arrays[f"logprobs_{index}"] = one.logprobs
        arrays[f"gaps_{index}"] = one.gaps
    return arrays


def make_smollm2(gguf: Path, directory: Path, date: datetime.date) -> None:
    """Write golden.json and golden.npz into `directory`; refuse prompts whose greedy choices are too close."""
    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, model = load_tokenizer(gguf), load_model(gguf)
    measured, entries = [], []
    for prompt in PROMPTS:
        one, entry = _measure_prompt(model, tokenizer, prompt)
        measured.append(one)
        entries.append(entry)
        noise = entry["cached_decode_noise"]
        print(f"{prompt.name:18} {len(one.prompt):4} tokens  min gap {one.min_gap:.4f}  noise {noise:.1e}")
    close = [entry["name"] for entry in entries if entry["min_gap"] < MIN_GAP]
    if close:
        raise ValueError(f"too close to call, change these prompts: {close}")
    index = next(i for i, prompt in enumerate(PROMPTS) if prompt.name == TOP_LOGPROBS_PROMPT)
    golden = {
        "model": "SmolLM2-135M-Instruct",
        "weights": {"file": gguf.name, "sha256": sha256(gguf), "dequantized_to": "float32"},
        "provenance": provenance(None, date),
        "arrays": "golden.npz",
        "prompts": entries,
        "top_logprobs": _top_logprobs(model, measured[index]),
        **_tokenizer_golden(tokenizer),
    }
    write_json(directory / "golden.json", golden)
    write_npz(directory / "golden.npz", _arrays(measured))
