"""The demo model's file itself: tensors, config and tokenizer as transformers reads them (golden/smollm2)."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.config import Environment
from engine.errors import ModelNotFoundError
from engine.sampling_params import SamplingParams
from engine.text.output_text import OutputText
from engine.text.tokenizer import Tokenizer
from models.loading.gguf import GgufTensors, gguf_config, read_gguf
from models.loading.resolver import FetchOptions, resolve_model

pytestmark = pytest.mark.slow

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "golden" / "smollm2" / "golden.json").read_text(encoding="utf-8")
)
# SHA-256 over name and float32 bytes of each tensor, sorted by name, as transformers 5.23 loads the same file.
TENSORS_SHA256 = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"


@pytest.fixture(scope="module")
def path() -> Path:
    environment = Environment.read()
    try:
        return resolve_model("demo", FetchOptions(environment.cache_dir, offline=environment.offline)).path
    except ModelNotFoundError as error:
        pytest.skip(f"the demo model cannot be had: {error}")


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


def test_tensors_are_bit_equal_to_those_of_transformers(path: Path) -> None:
    source = GgufTensors(read_gguf(path))
    digest = hashlib.sha256()
    for name in sorted(source.names()):
        digest.update(name.encode())
        digest.update(source.read(name).tobytes())
    assert len(source.names()) == 272 and digest.hexdigest() == TENSORS_SHA256


def test_config(path: Path) -> None:
    config = gguf_config(read_gguf(path))
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected


def test_tokenizer_cases(tokenizer: Tokenizer) -> None:
    assert len(GOLDEN["tokenizer_cases"]) == 30
    for case in GOLDEN["tokenizer_cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_prompts_and_chats(tokenizer: Tokenizer) -> None:
    for prompt in GOLDEN["prompts"]:
        assert tokenizer.encode(prompt["text"]) == prompt["prompt"], prompt["name"]
    for chat in GOLDEN["chats"]:
        text = tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=chat["add_generation_prompt"])
        assert text == chat["text"] and tokenizer.encode(text, add_special_tokens=False) == chat["ids"]


@pytest.mark.parametrize("skip", [True, False])
def test_continuations_stream_to_their_text(tokenizer: Tokenizer, skip: bool) -> None:
    for prompt in GOLDEN["prompts"]:
        pieces = stream(tokenizer, prompt["prompt"], prompt["continuation"], skip)
        expected = prompt["continuation_text_without_special" if skip else "continuation_text"]
        assert "".join(pieces) == expected, prompt["name"]


def stream(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], skip: bool) -> list[str]:
    text = OutputText(tokenizer, prompt, SamplingParams(skip_special_tokens=skip))
    return [*(text.push([token_id]) for token_id in output), text.push([], finished=True)]
