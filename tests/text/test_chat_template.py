"""What templates may use and what happens when they cannot render."""

import json
from typing import Any

import pytest

from engine.errors import InvalidRequestError
from engine.text.chat_template import render_chat

CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<end>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
USER = {"role": "user", "content": "hi"}


def render(source: str, messages: list[Any], prompt: bool = False, cont: bool = False, **variables: Any) -> str:
    return render_chat(source, messages, variables, add_generation_prompt=prompt, continue_final_message=cont)


def test_generation_prompt() -> None:
    assert render(CHATML, [USER]) == "<|user|>hi<end>\n"
    assert render(CHATML, [USER], prompt=True) == "<|user|>hi<end>\n<|assistant|>"


@pytest.mark.parametrize("content", ["so ", "so", " so\n"])
def test_final_message_stays_open(content: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    assert render(CHATML, messages, cont=True) == "<|user|>hi<end>\n<|assistant|>" + content
    stripping = CHATML.replace("message['content']", "message['content'] | trim")
    assert render(stripping, messages, cont=True) == "<|user|>hi<end>\n<|assistant|>" + content.strip()
    assert messages[-1] == {"role": "assistant", "content": content}


def test_final_message_in_parts_stays_open() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    source = "{% for part in messages[-1].content %}{{ part.text }}{% endfor %}<end>"
    assert render(source, [{"role": "assistant", "content": parts}], cont=True) == "ab"
    assert parts[-1] == {"type": "text", "text": "b"}


def test_tools_of_the_trade() -> None:
    assert json.loads(render("{{ tools | tojson(indent=2) }}", [], tools=[{"a": "<é>"}])) == [{"a": "<é>"}]
    assert render("{{ x | tojson }}", [], x={"b": "<é>", "a": 1}) == '{"b": "<é>", "a": 1}'
    assert render("{{ strftime_now('%%') }}", []) == "%"
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", []) == "1"
    assert render("  {% generation %}\n  x\n  {% endgeneration %}\ny", []) == "  x\ny"
    assert render("{{ tools is none }}{{ documents is none }}", []) == "TrueTrue"
    assert render("{{ messages[0].reasoning_content }}", [{"role": "assistant", "reasoning": "why"}]) == "why"


@pytest.mark.parametrize(
    ("source", "messages", "parameter", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", [USER], "messages", "roles must alternate"),
        ("{{ messages[0].role.nothing.more }}", [USER], "messages", "has no attribute 'nothing'"),
        ("{{ 'a' + messages[0].content }}", [{"role": "user", "content": None}], "messages", "fails on these"),
        ("{{ ''.__class__.__mro__ }}", [USER], "messages", "unsafe"),
        ("{% for %}", [USER], "chat_template", "not valid Jinja"),
        (CHATML, ["hi"], "messages", "must hold objects, got str"),
        (CHATML, [{"role": "user", "content": object()}], "messages", "plain data"),
    ],
)
def test_faults_name_the_parameter(source: str, messages: list[Any], parameter: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as caught:
        render(source, messages)
    assert caught.value.parameter == parameter


def test_continuing_needs_a_message_that_is_rendered() -> None:
    for messages, source in (([], CHATML), ([{"role": "assistant"}], CHATML), ([USER], "nothing of it")):
        with pytest.raises(InvalidRequestError, match="continue_final_message"):
            render(source, messages, cont=True)
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        render(CHATML, [USER], prompt=True, cont=True)
