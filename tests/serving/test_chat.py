"""`/v1/chat/completions`, `/tokenize`, `/detokenize`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from engine.text.tokenizer import Tokenizer
from serving.http.context import ServerContext
from serving.http.parsers import AnswerReader, ParserRequest
from serving.parsing.deltas import ContentDelta, Delta, OutputParser, ReasoningDelta, ToolCallDelta
from serving.protocol.chat import ChatChunk, ChatResponse
from tests.serving.fakes import MODEL, FakeEngine, Script, async_test, post, serving, stream, tiny_tokenizer

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}


def prompt_of(engine: FakeEngine, number: int = 0) -> str:
    """The text of a prompt that the engine was given."""
    return engine.seen[number][1]["prompt"]


def joined(events: list[Any]) -> dict[int, dict[str, Any]]:
    """Index → the choice that all events together make, as a whole answer has it."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        ChatChunk.model_validate(event)
        for part in event["choices"]:
            index, delta = part["index"], part["delta"]
            if index not in choices:
                assert delta["role"] == "assistant", "the first event says whose it is"
                choices[index] = {"content": "", "reasoning": "", "calls": {}, "logprobs": [], "token_ids": []}
            whole = choices[index]
            assert whole.get("finish_reason") is None, "nothing comes after the end"
            whole["content"] += delta.get("content") or ""
            whole["reasoning"] += delta.get("reasoning") or ""
            for call in delta.get("tool_calls") or ():
                known = whole["calls"].setdefault(call["index"], {"arguments": ""})
                known |= {k: v for k, v in (("id", call.get("id")), ("name", call["function"].get("name"))) if v}
                known["arguments"] += call["function"]["arguments"]
            whole["logprobs"] += (part["logprobs"] or {}).get("content", [])
            whole["token_ids"] += part.get("token_ids", [])
            whole["finish_reason"], whole["stop_reason"] = part["finish_reason"], part.get("stop_reason")
    return choices


@async_test
async def test_the_body_is_openais() -> None:
    async with serving(FakeEngine(Script(answer="A red fox."))) as (client, engine):
        status, body = await post(client, PATH, {"model": MODEL, "messages": HELLO})
    assert status == 200
    ChatResponse.model_validate(body)
    choice = body["choices"][0]
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert choice["message"] == {"role": "assistant", "content": "A red fox.", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    assert prompt_of(engine) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert engine.seen[0][1]["prompt_token_ids"] == tiny_tokenizer().encode(prompt_of(engine), False)
    assert engine.seen[0][2].max_tokens == 512 - body["usage"]["prompt_tokens"], "the rest of the context"


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"return_token_ids": True}])
@async_test
async def test_a_stream_says_the_same(extra: dict[str, Any]) -> None:
    async with serving(FakeEngine(Script(tokens_per_output=(1, 3, 0, 2)))) as (client, _):
        _, body = await post(client, PATH, {"messages": HELLO, **extra})
        events = await stream(client, PATH, {"messages": HELLO, **extra})
    choices = joined(events)
    assert len(choices) == len(body["choices"]) == extra.get("n", 1)
    for choice in body["choices"]:
        streamed = choices[choice["index"]]
        assert streamed["content"] == choice["message"]["content"]
        assert streamed["finish_reason"] == choice["finish_reason"]
        assert streamed["logprobs"] == (choice["logprobs"] or {"content": []})["content"]
        assert streamed["token_ids"] == choice.get("token_ids", [])
    assert events[0].get("prompt_token_ids") == body.get("prompt_token_ids")


@async_test
async def test_logprobs_have_the_bytes_of_tokens() -> None:
    answer = "naïve 日本 🦊"
    async with serving(FakeEngine(Script(answer=answer))) as (client, _):
        _, body = await post(client, PATH, {"messages": HELLO, "logprobs": True, "top_logprobs": 4})
    entries = body["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in entries[:-1] for byte in entry["bytes"]).decode() == answer
    for entry in entries:
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(tops) == 4 and tops == sorted(tops, reverse=True)


@async_test
async def test_limits_of_the_answer() -> None:
    async with serving(FakeEngine(Script(answer="one two three four"))) as (client, engine):
        for body in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
            _, answer = await post(client, PATH, {"messages": HELLO, **body})
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == 3
        status, answer = await post(client, PATH, {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4})
    assert status == 400 and answer["error"]["param"] == "max_tokens"
    assert len(engine.seen) == 3


def with_template(source: str) -> Callable[[ServerContext], ServerContext]:
    """Use another template."""
    return lambda context: dataclasses.replace(context, renderer=dataclasses.replace(context.renderer, template=source))


SHOW_ALL = (
    "{% for m in messages %}[{{ m.role }}|{{ m.content }}|{{ m.tool_calls | tojson if m.tool_calls else '' }}]"
    "{% endfor %}{{ tools | tojson if tools else '' }}{{ documents | tojson if documents else '' }}"
    "{{ reasoning_effort or '' }}{{ extra or '' }}{% if add_generation_prompt %}>{% endif %}"
)


@async_test
async def test_what_templates_see() -> None:
    async with serving(prepare=with_template(SHOW_ALL)) as (client, engine):
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        messages = [
            {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
        ]
        body = {
            "messages": messages,
            "documents": [{"title": "t"}],
            "reasoning_effort": "low",
            "chat_template_kwargs": {"extra": "E"},
            "tools": [TOOL],
            "tool_choice": "none",
        }
        status, answer = await post(client, PATH, body)
        assert status == 200, answer
    text = prompt_of(engine)
    assert text.startswith("[system|be\nbrief|][assistant||[{"), "developer is system where the template lacks it"
    assert '"arguments": {"a": 1}' in text and '"name": "add"' in text and '[{"title": "t"}]lowE>' in text


@async_test
async def test_developer_stays_where_the_template_knows_it() -> None:
    source = "{% for m in messages %}{% if m.role == 'developer' %}D{% endif %}{{ m.role }}{% endfor %}"
    async with serving(prepare=with_template(source)) as (client, engine):
        await post(client, PATH, {"messages": [{"role": "developer", "content": "x"}]})
    assert prompt_of(engine) == "Ddeveloper"


@async_test
async def test_a_final_message_can_be_continued() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The fox"}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False, "echo": True}
    async with serving(FakeEngine(Script(answer=" is red."))) as (client, engine):
        _, answer = await post(client, PATH, body)
        streamed = joined(await stream(client, PATH, body))
        status, refused = await post(client, PATH, {**body, "add_generation_prompt": True})
    assert prompt_of(engine).endswith("assistant\nThe fox")
    assert answer["choices"][0]["message"]["content"] == streamed[0]["content"] == "The fox is red."
    assert status == 400 and refused["error"]["param"] == "continue_final_message"


@async_test
async def test_templates_of_requests_need_trust() -> None:
    body = {"messages": HELLO, "chat_template": "T{{ messages[0].content }}"}
    async with serving() as (client, _):
        status, answer = await post(client, PATH, body)
        assert status == 400 and "--trust-request-chat-template" in answer["error"]["message"]
    async with serving(trust_request_chat_template=True) as (client, engine):
        status, _ = await post(client, PATH, body)
        assert status == 200 and prompt_of(engine) == "Thello"


class Marks:
    """A parser for tests: `<x` is reasoning, `#x` is a tool call's arguments, other characters are content."""

    def __init__(self) -> None:
        self.mark, self.calls = "", 0

    def feed(self, text: str) -> list[Delta]:
        found: list[Delta] = []
        for char in text:
            if char in "<#":
                self.mark = char
            elif self.mark == "<":
                found.append(ReasoningDelta(char))
                self.mark = ""
            elif self.mark == "#":
                found.append(ToolCallDelta(self.calls, f"call_{self.calls}", "add", char))
                self.calls, self.mark = self.calls + 1, ""
            else:
                found.append(ContentDelta(char))
        return found

    def finish(self) -> list[Delta]:
        return [ContentDelta("!")]


class MarksFactory:
    json_schema = None
    skip_special_tokens = True

    def __init__(self) -> None:
        self.requests: list[ParserRequest] = []
        self.prompts: list[str] = []

    def reader(self, request: ParserRequest) -> AnswerReader:
        self.requests.append(request)
        return self

    def parser(self, prompt_text: str = "") -> OutputParser:
        self.prompts.append(prompt_text)
        return Marks()


@pytest.mark.parametrize("shows", [True, False])
@async_test
async def test_parsers_make_reasoning_and_calls(shows: bool) -> None:
    factory = MarksFactory()
    body = {"messages": HELLO, "tools": [TOOL], "tool_choice": "required", "include_reasoning": shows}
    engine = FakeEngine(Script(answer="<ab#1c#2"))
    prepare: Callable[[ServerContext], ServerContext] = lambda c: dataclasses.replace(c, parsers=factory)  # noqa: E731
    async with serving(engine, prepare=prepare) as (client, _):
        _, answer = await post(client, PATH, body)
        streamed = joined(await stream(client, PATH, body))[0]
    message = answer["choices"][0]["message"]
    assert message["content"] == streamed["content"] == "bc!"
    assert message.get("reasoning", "") == streamed["reasoning"] == ("a" if shows else "")
    assert [(c["id"], c["function"]) for c in message["tool_calls"]] == [
        ("call_0", {"name": "add", "arguments": "1"}),
        ("call_1", {"name": "add", "arguments": "2"}),
    ]
    assert [streamed["calls"][i]["arguments"] for i in (0, 1)] == ["1", "2"]
    assert answer["choices"][0]["finish_reason"] == streamed["finish_reason"] == "tool_calls"
    assert factory.requests[0].tool_choice == "required" and factory.requests[0].tools == [TOOL]
    assert factory.prompts[0] == prompt_of(engine)


@async_test
async def test_tokenize_and_detokenize() -> None:
    tokenizer: Tokenizer = tiny_tokenizer()
    async with serving() as (client, engine):
        _, text = await post(client, "/tokenize", {"prompt": "hello", "return_token_strs": True})
        _, chat = await post(client, "/tokenize", {"messages": HELLO, "tools": [TOOL]})
        await post(client, PATH, {"messages": HELLO})
        _, back = await post(client, "/detokenize", {"tokens": text["tokens"]})
        for wrong in ({}, {"prompt": "a", "messages": HELLO}, {"prompt": "a", "model": "x"}):
            status, _ = await post(client, "/tokenize", wrong)
            assert status in (400, 404)
        status, _ = await post(client, "/detokenize", {"tokens": [320]})
        assert status == 400
    assert text["tokens"] == tokenizer.encode("hello") and text["count"] == len(text["tokens"])
    assert len(text["token_strs"]) == text["count"] and text["max_model_len"] == 512
    assert chat["tokens"] == engine.seen[0][1]["prompt_token_ids"]
    assert back["prompt"] == tokenizer.decode(text["tokens"])
