"""Bad prompts, settings and models: one clear error each, and nobody else is harmed."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.async_engine import AsyncEngine
from engine.engine import Engine
from engine.errors import (
    CacheWriteError,
    ConfigError,
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    OutOfMemoryError,
    QueueFullError,
    QuireError,
    UnsupportedModelError,
    WeightsError,
)
from engine.sampling_params import BeamSearchParams, SamplingParams
from tests.engine.conftest import MakeEngine
from tests.engine.helpers import SMALL, TINY, core_of, golden_prompts, inputs_of, random_ids

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
MAX_LEN = SMALL["max_model_len"]

BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "must not be empty"),
    ([[]], "must not be empty"),
    ([], "list of prompts must not be empty"),
    ([[5], ""], "must not be empty"),
    ({"prompt": ""}, "must not be empty"),
    ({"prompt_token_ids": []}, "must not be empty"),
    ([5, 320], "token id 320 is not in the vocabulary: ids are 0 to 319"),
    ([-1], "token id -1 is not in the vocabulary: ids are 0 to 319"),
    ([10**30], "ids are 0 to 319"),
    ([[5, True]], "token ids must be integers, got True"),
    ([True, 5], "token ids must be integers, got True"),
    ([[5, 1.0]], "token ids must be integers, got 1.0"),
    ([[float("nan")]], "token ids must be integers, got nan"),
    ([[5, "a"]], "token ids must be integers, got 'a'"),
    ([[5, None]], "token ids must be integers, got None"),
    ([[[5]]], "token ids must be integers, got [5]"),
    (np.array([[5.5]]), "token ids must be integers"),
    ([5, "text"], "text or a list of token ids, got int"),
    (None, "got None"),
    (5, "got 5"),
    ([None], "text or a list of token ids, got NoneType"),
    (b"bytes", "text or a list of token ids"),
    ([b"bytes"], "text or a list of token ids, got bytes"),
    ({}, "needs 'prompt' or 'prompt_token_ids'"),
    ({"text": "x"}, "unknown keys ['text']"),
    ({"prompt": "x", "cache_salt": 5}, "cache_salt must be a non-empty string, got 5"),
    ({"prompt": "x", "cache_salt": ""}, "cache_salt must be a non-empty string, got ''"),
    ({"prompt": 5}, "text or a list of token ids, got int"),
    ({"prompt": 5, "prompt_token_ids": [6]}, "must be text, got 5"),
    ("half a pair: \ud800", "lone surrogate"),
]


@pytest.mark.parametrize(("prompt", "says"), BAD_PROMPTS, ids=lambda v: repr(v)[:30])
def test_bad_prompts(prompt: Any, says: str, engine: Engine) -> None:
    before = engine.metrics()["num_requests"]
    with pytest.raises(InvalidRequestError) as caught:
        engine.generate(prompt, GREEDY)
    assert says in str(caught.value)
    assert caught.value.parameter in ("prompt", "cache_salt")
    assert engine.metrics()["num_requests"] == before, "nothing was started"


@pytest.mark.parametrize("length", [MAX_LEN, MAX_LEN + 1, 10 * MAX_LEN])
def test_prompts_that_are_too_long(length: int, engine: Engine) -> None:
    prompt = random_ids(np.random.default_rng(0), length)
    with pytest.raises(ContextLengthError) as caught:
        engine.generate([[5], prompt], GREEDY)
    message = str(caught.value)
    assert f"maximum context length is {MAX_LEN}" in message and f"{length} tokens" in message
    assert f"at most {MAX_LEN - 1} tokens" in message
    assert caught.value.code == "context_length_exceeded" and caught.value.parameter == "prompt"


@pytest.mark.parametrize(
    ("call", "parameter", "says"),
    [
        (lambda e: e.generate([[5], [6]], [GREEDY]), "sampling_params", "2 prompts but 1 sampling_params"),
        (lambda e: e.generate([[5]], []), "sampling_params", "1 prompts but 0 sampling_params"),
        (lambda e: e.generate([[5]], {"max_tokens": 3}), "sampling_params", "got {'max_tokens': 3}"),
        (lambda e: e.generate([[5]], [None]), "sampling_params", "got [None]"),
        (lambda e: e.generate([[5]], GREEDY, priority=[1]), "priority", "scheduling_policy='priority'"),
        (lambda e: e.generate([[5]], GREEDY, priority=[1, 2]), "priority", "1 prompts but 2 priorities"),
        (lambda e: e.chat([]), "messages", "non-empty list"),
        (lambda e: e.chat("hello"), "messages", "got 'hello'"),
        (lambda e: e.chat([{"role": "user"}]), "messages", "chat template"),
        (lambda e: e.chat([{"role": "user", "content": "x"}, "y"]), "messages", "got str"),
        (lambda e: e.chat([{"role": "user", "content": object()}]), "messages", "plain data"),
        (
            lambda e: e.chat([{"role": "user", "content": "x"}], continue_final_message=True),
            "continue_final_message",
            "exclude each other",
        ),
        (lambda e: e.beam_search([400], BeamSearchParams(beam_width=2, max_tokens=2)), "prompt", "0 to 319"),
        (lambda e: next(e.stream("")), "prompt", "empty"),
    ],
)
def test_bad_calls(call: Callable[[Engine], Any], parameter: str, says: str, engine: Engine) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        call(engine)
    assert caught.value.parameter == parameter and says in str(caught.value), str(caught.value)


def test_a_bad_priority(make_engine: MakeEngine) -> None:
    with pytest.raises(InvalidRequestError, match="priority must be an integer, got 'high'"):
        make_engine(scheduling_policy="priority").generate([[5], [6]], GREEDY, priority=[1, "high"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("call", "parameter"),
    [
        (lambda e: e.generate("text", GREEDY), "prompt"),
        (lambda e: e.generate([5], GREEDY.replace(stop="x")), "stop"),
        (lambda e: e.generate([5], GREEDY.replace(bad_words=["x"])), "bad_words"),
        (lambda e: e.chat([{"role": "user", "content": "x"}]), "messages"),
    ],
)
def test_what_needs_a_tokenizer(call: Callable[[Engine], Any], parameter: str, make_engine: MakeEngine) -> None:
    with pytest.raises(InvalidRequestError, match="skip_tokenizer_init") as caught:
        call(make_engine(skip_tokenizer_init=True))
    assert caught.value.parameter == parameter


class TestOthersAreUnharmed:
    """Bad requests among good ones."""

    def test_in_a_core(self, engine: Engine) -> None:
        golden, core, make = golden_prompts(TINY / "llama"), core_of(engine), inputs_of(engine).make
        for i, g in enumerate(golden):
            core.add(make(g.prompt, GREEDY, request_id=f"good-{i}"))
        outputs, step = {}, 0
        while core.has_work:
            for output in core.step():
                outputs[output.request_id] = output
            prompt, _ = BAD_PROMPTS[step % len(BAD_PROMPTS)]
            with pytest.raises(InvalidRequestError):
                make([] if isinstance(prompt, list) else prompt, GREEDY)
            live = [
                name for name in (f"good-{i}" for i in range(5)) if name not in outputs or not outputs[name].finished
            ]
            if live:
                with pytest.raises(InvalidRequestError, match=f"'{live[0]}' is in use") as caught:
                    core.add(make([5], GREEDY, request_id=live[0]))
                assert caught.value.parameter == "request_id"
            step += 1
        for i, g in enumerate(golden):
            assert list(outputs[f"good-{i}"].outputs[0].token_ids) == g.continuation[:8]

    def test_in_a_list_nothing_is_started(self, engine: Engine) -> None:
        """One bad prompt in a list: the whole call is refused, and the stream beside it goes on."""
        golden = golden_prompts(TINY / "llama")[1]
        stream = engine.stream(golden.prompt, GREEDY)
        tokens = list(next(stream).outputs[0].token_ids)
        with pytest.raises(InvalidRequestError):
            engine.generate([[5], [6], [999]], GREEDY)
        tokens += [t for output in stream for t in output.outputs[0].token_ids]
        assert tokens == golden.continuation[:8]

    def test_a_full_queue(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_num_queued_reqs=3, max_num_queued_tokens=60)
        with pytest.raises(QueueFullError, match="max_num_queued_reqs=3"):
            engine.generate([[5], [6], [7], [8]], GREEDY)
        with pytest.raises(QueueFullError, match="max_num_queued_tokens=60"):
            engine.generate([[5] * 40, [6] * 40], GREEDY)
        golden = golden_prompts(TINY / "llama")[4]  # more tokens than the limit, but nobody else waits
        assert list(engine.generate(golden.prompt, GREEDY)[0].outputs[0].token_ids) == golden.continuation[:8]

    def test_in_an_async_engine(self, compilation_cache: str) -> None:
        golden = golden_prompts(TINY / "llama")

        async def good(engine: AsyncEngine, index: int) -> list[int]:
            outputs = [o async for o in engine.generate(golden[index].prompt, GREEDY, request_id=f"good-{index}")]
            return list(outputs[-1].outputs[0].token_ids)

        async def bad(engine: AsyncEngine, prompt: Any, **options: Any) -> str:
            with pytest.raises(InvalidRequestError) as caught:
                async for _ in engine.generate(prompt, **{"sampling_params": GREEDY, **options}):
                    raise AssertionError("a bad request has an output")
            return str(caught.value)

        async def scenario() -> None:
            async with AsyncEngine(str(TINY / "llama"), compilation_cache_dir=compilation_cache, **SMALL) as engine:
                goods = [asyncio.create_task(good(engine, index)) for index in range(5)]
                await asyncio.sleep(0)
                assert "0 to 319" in await bad(engine, [320])
                assert f"{MAX_LEN} tokens" in await bad(engine, [5] * MAX_LEN)
                assert "empty" in await bad(engine, "")
                assert "'good-0' is in use" in await bad(engine, [5], request_id="good-0")
                assert "non-empty string, got 7" in await bad(engine, [5], request_id=7)
                assert "scheduling_policy='priority'" in await bad(engine, [5], priority=1)
                assert "got {}" in await bad(engine, [5], sampling_params={})
                assert await asyncio.gather(*goods) == [g.continuation[:8] for g in golden]
                assert engine.metrics()["num_failed_steps"] == 0

        asyncio.run(scenario())


BAD_SETTINGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"max_num_sequences": 4}, ["Unknown setting max_num_sequences", "max_num_seqs"]),
    ({"max_num_seqs": 0}, ["max_num_seqs", "at least 1", "0"]),
    ({"max_num_seqs": "8"}, ["max_num_seqs must be an integer or None, got '8'"]),
    ({"max_num_seqs": 2.5}, ["max_num_seqs must be an integer or None, got 2.5"]),
    ({"max_num_batched_tokens": 3}, ["max_num_batched_tokens=3", "max_num_seqs=4"]),
    ({"max_model_len": 513}, ["max_model_len=513", "512 or less"]),
    ({"max_model_len": 1}, ["max_model_len must be at least 2, got 1"]),
    ({"max_model_len": "100"}, ["max_model_len must be an integer or None, got '100'"]),
    ({"enable_chunked_prefill": False}, ["max_num_batched_tokens=64", "max_model_len=128"]),
    ({"enable_chunked_prefill": "no"}, ["enable_chunked_prefill must be True or False, got 'no'"]),
    (
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 128, "long_prefill_token_threshold": 8},
        ["long_prefill_token_threshold=8", "enable_chunked_prefill=False"],
    ),
    ({"block_size": 12}, ["block_size", "8, 16, 32, 64 or 128", "12"]),
    ({"gpu_memory_utilization": 1.5}, ["gpu_memory_utilization", "(0, 1]", "1.5"]),
    ({"gpu_memory_utilization": float("nan")}, ["gpu_memory_utilization", "(0, 1]", "nan"]),
    ({"num_gpu_blocks_override": 1}, ["num_gpu_blocks_override must be at least 2, got 1"]),
    ({"kv_cache_memory_bytes": 0}, ["kv_cache_memory_bytes must be positive, got 0"]),
    ({"scheduling_policy": "random"}, ["scheduling_policy", "fcfs, priority", "'random'"]),
    ({"dtype": "int8"}, ["dtype", "float32, bfloat16, float16", "'int8'"]),
    ({"load_format": "pickle"}, ["load_format", "safetensors", "'pickle'"]),
    ({"attention_implementation": "triton"}, ["attention_implementation", "xla", "'triton'"]),
    ({"matmul_implementation": "triton"}, ["matmul_implementation", "xla", "'triton'"]),
    ({"quantization": "awq"}, ["quantization", "int8, int8_w8a8, fp8", "'awq'"]),
    ({"quantization": 8}, ["quantization must be text or None, got 8"]),
    ({"max_logprobs": -2}, ["max_logprobs must be -1 or more, got -2"]),
    ({"compile_threads": 0}, ["compile_threads must be at least 1, got 0"]),
    ({"seed": -1}, ["seed must be 0 or more, got -1"]),
    ({"seed": None}, ["seed must be an integer, got None"]),
    ({"long_prefill_token_threshold": -1}, ["long_prefill_token_threshold must be 0 or more, got -1"]),
    ({"max_num_queued_reqs": 0}, ["max_num_queued_reqs must be at least 1, got 0"]),
]


@pytest.mark.parametrize(("settings", "says"), BAD_SETTINGS, ids=lambda v: repr(v)[:40])
@pytest.mark.parametrize("kind", [Engine, AsyncEngine])
def test_bad_settings(kind: type[Engine | AsyncEngine], settings: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(str(TINY / "llama"), **{**SMALL, **settings})
    assert all(part in str(caught.value) for part in says), str(caught.value)


@pytest.mark.parametrize("blocks", [2, 8])
def test_too_little_memory_for_one_request(blocks: int) -> None:
    """`num_gpu_blocks_override` counts the null block, which no sequence can have."""
    with pytest.raises(OutOfMemoryError) as caught:
        Engine(str(TINY / "llama"), **{**SMALL, "num_gpu_blocks_override": blocks})
    message = str(caught.value)
    assert "max_model_len=128 tokens needs 8 KV blocks" in message
    assert f"Set max_model_len={16 * (blocks - 1)} or less" in message


def test_the_length_that_fits_does_fit(compilation_cache: str) -> None:
    settings = {**SMALL, "num_gpu_blocks_override": None, "kv_cache_memory_bytes": 300_000}
    settings["max_num_batched_tokens"] = 4  # fewer executables: no other engine has a cache of this size
    settings["compilation_cache_dir"] = compilation_cache
    with pytest.raises(OutOfMemoryError) as caught:
        Engine(str(TINY / "llama"), **{**settings, "max_model_len": 512})
    fits = int(str(caught.value).split("Set max_model_len=")[1].split()[0])
    assert 16 <= fits < 512
    with Engine(str(TINY / "llama"), **{**settings, "max_model_len": fits}) as engine:
        output = engine.generate([5] * (fits - 4), GREEDY)[0]
        assert len(output.outputs[0].token_ids) == 4
    with pytest.raises(OutOfMemoryError, match="smaller model"):
        Engine(str(TINY / "llama"), **{**settings, "kv_cache_memory_bytes": 100})


class TestBadModels:
    """What is wrong with a model's files."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        """A copy of the tiny llama, to be damaged."""
        return Path(shutil.copytree(TINY / "llama", tmp_path / "model"))

    @staticmethod
    def change_config(model: Path, **changes: Any) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    @staticmethod
    def refused(model: Path | str, kind: type[QuireError], *says: str, **settings: Any) -> None:
        with pytest.raises(kind) as caught:
            Engine(model, **{**SMALL, **settings})  # type: ignore[arg-type]
        assert all(part in str(caught.value) for part in says), str(caught.value)
        assert "\n" not in str(caught.value).strip()

    def test_unknown(self, tmp_path: Path) -> None:
        self.refused("no such model", ModelNotFoundError, "no such model", "hub id", "demo")
        self.refused(tmp_path / "absent", ModelNotFoundError, "absent")
        self.refused(tmp_path, ModelNotFoundError, "config.json")
        self.refused("", ConfigError, "model must not be empty")

    def test_truncated_weights(self, model: Path) -> None:
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        self.refused(model, WeightsError, "model.safetensors", "truncated")
        file.write_bytes(file.read_bytes()[:5])
        self.refused(model, WeightsError, "model.safetensors")
        file.write_bytes(b"")
        self.refused(model, WeightsError, "model.safetensors")

    def test_corrupt_weights(self, model: Path) -> None:
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:8] + b"}" * 100 + file.read_bytes()[108:])
        self.refused(model, WeightsError, "model.safetensors")

    def test_missing_weights(self, model: Path) -> None:
        (model / "model.safetensors").unlink()
        self.refused(model, ModelNotFoundError, "safetensors")

    def test_tensors_that_do_not_fit_the_config(self, model: Path) -> None:
        self.change_config(model, intermediate_size=100)
        self.refused(model, WeightsError, "mlp", "100")
        self.change_config(model, intermediate_size=128, num_hidden_layers=4)
        self.refused(model, WeightsError, "model.layers.3")

    def test_unsupported_architecture(self, model: Path) -> None:
        self.change_config(model, architectures=["MambaForCausalLM"], model_type="mamba")
        self.refused(model, UnsupportedModelError, "MambaForCausalLM", "LlamaForCausalLM")

    def test_unsupported_config(self, model: Path) -> None:
        self.change_config(model, hidden_act="relu6")
        self.refused(model, UnsupportedModelError, "Activation 'relu6'", "silu")

    def test_config_that_is_no_json(self, model: Path) -> None:
        (model / "config.json").write_text("{")
        self.refused(model, UnsupportedModelError, "config.json", "JSON")

    def test_tokenizer(self, model: Path) -> None:
        (model / "tokenizer.json").write_text("{}")
        self.refused(model, WeightsError, "tokenizer.json")
        (model / "tokenizer.json").unlink()
        self.refused(model, ModelNotFoundError, "tokenizer.json is missing")
        self.refused(TINY / "llama", ModelNotFoundError, "absent", tokenizer=str(model / "absent"))

    def test_chat_without_a_template(self, model: Path, compilation_cache: str) -> None:
        config = json.loads((model / "tokenizer_config.json").read_text())
        del config["chat_template"]
        (model / "tokenizer_config.json").write_text(json.dumps(config))
        with Engine(str(model), compilation_cache_dir=compilation_cache, **SMALL) as engine:
            with pytest.raises(InvalidRequestError, match="no default chat template") as caught:
                engine.chat([{"role": "user", "content": "x"}])
            assert caught.value.parameter == "chat_template"
            assert engine.generate("x", GREEDY)[0].finished

    def test_a_compilation_cache_that_cannot_be_made(self, model: Path) -> None:
        self.refused(
            TINY / "llama",
            CacheWriteError,
            "compilation_cache_dir",
            "config.json",
            compilation_cache_dir=str(model / "config.json" / "cache"),
        )
