# ruff: noqa: RUF001  the look-alike characters are the point
"""A byte-level BPE tokenizer with 320 tokens and a ChatML template, trained on the paragraphs below."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from .files import write_json
from .specs import VOCAB_SIZE

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CORPUS = (
    "The little boat left the harbour before the sun was up. There was no wind, and the water lay as flat as a table; "
    "the only sound was the slow knock of the oars. By the time the others woke, the boat was a small dark point near "
    "the island, and the kettle on the stove had gone cold.",
    "On 12 March 1987 the village counted 1,204 people, 318 houses and 2 bridges. In 2023 there were 946 people, "
    "402 houses and still the same 2 bridges: 3.5% of the road budget, or about 17,250 a year, goes to their paint.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
    "Der alte Gärtner zählte die Äpfel, die Birnen und die Nüsse. Où est passé l'été ? Il était déjà tard, "
    "et le café était fermé. El niño pequeño preguntó por qué el año tenía doce meses.",
    "Дождь шёл весь день, и дети сидели дома. 雨が一日中降っていた。子供たちは家にいた。今天下雨，孩子们在家。",
    "Breakfast was 🍞 and 🍯, lunch was 🍲, and after the game everybody had 🍦. What a day 🎉🎉!",
)

CASES = (
    "",
    "the water lay as flat as a table",
    " leading space and trailing space ",
    "two  spaces,\ttab,\nnewline,\r\n\n  indented",
    "In 2023 there were 946 people.",
    "Gärtner, été, niño",
    "Дождь 雨 🍞🎉 \u200d end",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>",
    "<|im_start> is not special, <|im_end|>is",
    "for value in values:\n        total += value\n",
)

CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Where is the boat?"}],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "How many bridges?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And houses? 🏠"},
    ],
)


def _train() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens")
    return tokenizer


def _golden(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    cases = []
    for text in CASES:
        ids = tokenizer.encode(text, add_special_tokens=False)
        cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False)})
    chats = []
    for messages in CHATS:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        chats.append({"messages": messages, "add_generation_prompt": True, "text": text, "ids": ids})
    return {"cases": cases, "chats": chats}


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and tokenizer_golden.json into `directory`."""
    endoftext, im_start, im_end = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train(),
        bos_token=im_start,
        eos_token=im_end,
        pad_token=endoftext,
        chat_template=CHATML,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    write_json(path, config)
    write_json(directory / "tokenizer_golden.json", _golden(tokenizer))
