"""`/v1/completions`: every parameter, and streams that say the same as whole answers."""

from __future__ import annotations

from typing import Any

import pytest

from engine.sampling_params import RequestOutputKind, SamplingParams
from serving.protocol.completions import CompletionResponse
from tests.serving.fakes import MODEL, FakeEngine, Script, async_test, post, serving, stream, tiny_tokenizer

PATH = "/v1/completions"


def joined(events: list[Any]) -> dict[int, dict[str, Any]]:
    """Index → what all events together say of that choice."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        CompletionResponse.model_validate(event)
        for choice in event["choices"]:
            if choice["index"] not in choices:
                choices[choice["index"]] = dict(choice)
                continue
            whole = choices[choice["index"]]
            assert whole["finish_reason"] is None, "nothing comes after the end"
            whole["text"] += choice["text"]
            whole["finish_reason"], whole["stop_reason"] = choice["finish_reason"], choice["stop_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                whole["logprobs"][name] += values
            if "token_ids" in choice:
                whole["token_ids"] += choice["token_ids"]
    return choices


@async_test
async def test_the_body_is_openais() -> None:
    async with serving(FakeEngine(Script(answer="A red fox."))) as (client, _):
        status, body = await post(client, PATH, {"model": MODEL, "prompt": "What is it?"})
    assert status == 200
    CompletionResponse.model_validate(body)
    assert body["object"] == "text_completion" and body["model"] == MODEL and body["id"].startswith("cmpl-")
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("A red fox.", "stop", None)
    prompt, answer = (len(tiny_tokenizer().encode(text)) for text in ("What is it?", "A red fox."))
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": answer + 1,  # with the end token
        "total_tokens": prompt + answer + 1,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


GIVEN = {
    "n": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.25,
    "temperature": 0.75,
    "top_p": 0.5,
    "top_k": 7,
    "min_p": 0.125,
    "seed": 11,
    "stop": ["zz", "yy"],
    "stop_token_ids": [9, 10],
    "ignore_eos": True,
    "max_tokens": 5,
    "min_tokens": 2,
    "logprobs": 3,
    "prompt_logprobs": 2,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "include_stop_str_in_output": True,
    "logit_bias": {"17": -5.0},
    "allowed_token_ids": [4, 5, 17],
    "bad_words": ["q"],
}


@pytest.mark.parametrize("name", GIVEN)
@async_test
async def test_a_parameter_reaches_the_engine(name: str) -> None:
    async with serving() as (client, engine):
        body = {"prompt": [1, 5, 6], name: GIVEN[name]} | ({"temperature": 1.0} if name == "n" else {})
        status, answer = await post(client, PATH, body)
        assert status == 200, answer
    params = engine.seen[0][2]
    expected = SamplingParams(**{name: GIVEN[name]}, output_kind=RequestOutputKind.FINAL_ONLY)
    assert params == expected, "this field and no other"


@async_test
async def test_what_is_not_said_comes_from_the_model() -> None:
    defaults = SamplingParams(temperature=0.6, top_p=0.9, repetition_penalty=1.1, max_tokens=99)
    async with serving(FakeEngine(defaults=defaults)) as (client, engine):
        await post(client, PATH, {"prompt": "x", "top_p": 0.5})
        await post(client, PATH, {"prompt": "x", "temperature": None})
    first, second = (params for _, _, params, _ in engine.seen)
    assert (first.temperature, first.top_p, first.repetition_penalty, first.max_tokens) == (0.6, 0.5, 1.1, 16)
    assert second.temperature == 0.6


@async_test
async def test_many_prompts_and_choices_in_order() -> None:
    prompts = ["one", "two", "three"]
    async with serving() as (client, engine):
        _, body = await post(client, PATH, {"prompt": prompts, "n": 2})
        events = await stream(client, PATH, {"prompt": prompts, "n": 2})
        singles = [(await post(client, PATH, {"prompt": prompt, "n": 2}))[1] for prompt in prompts]
    texts = [choice["text"] for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert texts == [choice["text"] for single in singles for choice in single["choices"]]
    assert texts == [joined(events)[index]["text"] for index in range(6)]
    assert len({request_id for request_id, *_ in engine.seen}) == 9
    assert body["usage"]["prompt_tokens"] == sum(single["usage"]["prompt_tokens"] for single in singles)


@pytest.mark.parametrize("prompt", ["ab", [5, 6], ["ab"], [[5, 6]], [[5, 6], [7]]])
@async_test
async def test_prompts_as_text_and_as_ids(prompt: Any) -> None:
    async with serving() as (client, engine):
        status, body = await post(client, PATH, {"prompt": prompt, "echo": True, "return_token_ids": True})
    assert status == 200
    for choice, (_, given, _, _) in zip(body["choices"], engine.seen, strict=True):
        assert choice["prompt_token_ids"] == list(given["prompt_token_ids"])
        assert choice["text"].startswith(tiny_tokenizer().decode(given["prompt_token_ids"]))
        assert len(choice["token_ids"]) > 1


@async_test
async def test_echo_gives_the_logprobs_of_the_prompt() -> None:
    async with serving(FakeEngine(Script(answer="fox"))) as (client, _):
        _, body = await post(client, PATH, {"prompt": "hello", "echo": True, "logprobs": 2})
        _, only = await post(client, PATH, {"prompt": "hello", "echo": True, "logprobs": 2, "max_tokens": 0})
        shown = joined(await stream(client, PATH, {"prompt": "hello", "echo": True, "logprobs": 2, "max_tokens": 0}))
    ids = tiny_tokenizer().encode("hello")
    choice = body["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "hellofox"
    assert logprobs["tokens"][: len(ids)] == [tiny_tokenizer().token_text(token) for token in ids]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(len(top) in (2, 3) for top in logprobs["top_logprobs"][1:])
    assert logprobs["text_offset"][0] == 0 and sorted(logprobs["text_offset"]) == logprobs["text_offset"]
    hidden = only["choices"][0]
    assert (hidden["text"], hidden["finish_reason"]) == ("hello", "length")
    assert hidden["logprobs"]["tokens"] == logprobs["tokens"][: len(ids)]
    assert only["usage"]["completion_tokens"] == 0
    assert shown[0]["text"] == "hello" and shown[0]["logprobs"] == hidden["logprobs"]


@async_test
async def test_logprobs_without_candidates_and_as_ids() -> None:
    async with serving(FakeEngine(Script(answer="fox"))) as (client, _):
        _, none = await post(client, PATH, {"prompt": "a", "logprobs": 0})
        _, ids = await post(client, PATH, {"prompt": "a", "logprobs": 1, "return_tokens_as_token_ids": True})
    assert all(top == {} for top in none["choices"][0]["logprobs"]["top_logprobs"])
    assert all(token.startswith("token_id:") for token in ids["choices"][0]["logprobs"]["tokens"])


@async_test
async def test_prompt_logprobs() -> None:
    async with serving() as (client, _):
        _, body = await post(client, PATH, {"prompt": [4, 5, 6], "prompt_logprobs": 1})
    first, *others = body["choices"][0]["prompt_logprobs"]
    assert first is None and len(others) == 2
    expected = {"logprob": pytest.approx(-1.5 - 5 / 320), "rank": 2, "decoded_token": tiny_tokenizer().token_text(5)}
    assert others[0]["5"] == expected
    assert len(others[0]) == 2


@async_test
async def test_stop_texts_end_a_completion() -> None:
    async with serving(FakeEngine(Script(answer="one, two, three"))) as (client, _):
        _, cut = await post(client, PATH, {"prompt": "x", "stop": ", t", "max_tokens": 50})
        _, kept = await post(
            client, PATH, {"prompt": "x", "stop": [", t"], "include_stop_str_in_output": True, "max_tokens": 50}
        )
        streamed = joined(await stream(client, PATH, {"prompt": "x", "stop": ", t", "max_tokens": 50}))
    choice = cut["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one", "stop", ", t")
    assert kept["choices"][0]["text"] == "one, t"
    assert (streamed[0]["text"], streamed[0]["stop_reason"]) == ("one", ", t")


@async_test
async def test_usage_in_streams() -> None:
    body = {"prompt": "x", "stream_options": {"include_usage": True}}
    async with serving() as (client, _):
        _, whole = await post(client, PATH, {"prompt": "x"})
        events = await stream(client, PATH, body)
        running = await stream(
            client, PATH, {"prompt": "x", "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        )
        silent = await stream(client, PATH, {"prompt": "x", "stream_options": {"include_usage": False}})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    counts = [event["usage"]["completion_tokens"] for event in running]
    assert counts == sorted(counts) and counts[-1] == whole["usage"]["completion_tokens"] and counts[0] == 1
    assert all("usage" not in event for event in silent)


@async_test
async def test_truncation_priority_salt_and_ids() -> None:
    async with serving(FakeEngine(priorities=True)) as (client, engine):
        body = {
            "prompt": [4, 5, 6, 7],
            "truncate_prompt_tokens": 2,
            "priority": 3,
            "cache_salt": "s",
            "request_id": "mine",
        }
        _, answer = await post(client, PATH, body)
        async with client.post(PATH, json={"prompt": "x"}, headers={"X-Request-Id": "abc"}) as response:
            assert (await response.json())["id"] == "cmpl-abc"
            assert response.headers["X-Request-Id"] == "abc"
        _, whole = await post(client, PATH, {"prompt": list(range(3, 300)) * 3, "truncate_prompt_tokens": -1})
    request_id, prompt, _, priority = engine.seen[0]
    assert answer["id"] == request_id == "cmpl-mine" and priority == 3
    assert prompt == {"prompt_token_ids": [6, 7], "cache_salt": "s"}
    assert whole["usage"]["prompt_tokens"] == 511, "leaves room for an output"


@async_test
async def test_special_tokens_are_added_unless_not_wanted() -> None:
    async with serving() as (client, engine):
        await post(client, PATH, {"prompt": "ab"})
        await post(client, PATH, {"prompt": "ab", "add_special_tokens": False})
    tokenizer = tiny_tokenizer()
    assert engine.seen[0][1]["prompt_token_ids"] == tokenizer.encode("ab")
    assert engine.seen[1][1]["prompt_token_ids"] == tokenizer.encode("ab", add_special_tokens=False)


@async_test
async def test_labels_have_no_effect() -> None:
    labels = {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k", "store": False}
    async with serving() as (client, _):
        _, plain = await post(client, PATH, {"prompt": "x"})
        status, labelled = await post(client, PATH, {"prompt": "x", **labels, "unknown_field": 1})
    assert status == 200
    assert labelled["choices"] == plain["choices"]


@async_test
async def test_without_a_tokenizer_ids_work_and_text_does_not() -> None:
    async with serving(FakeEngine(tokenizer=None)) as (client, _):
        status, body = await post(client, PATH, {"prompt": [3, 4], "return_token_ids": True, "logprobs": 1})
        assert status == 200 and body["choices"][0]["token_ids"]
        assert body["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")
        for wrong in ({"prompt": "x"}, {"prompt": [3], "echo": True}, {"prompt": [3], "stop": "x"}):
            status, body = await post(client, PATH, wrong)
            assert status == 400 and "tokenizer" in body["error"]["message"]
