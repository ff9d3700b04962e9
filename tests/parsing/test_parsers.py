"""Each text of the corpus means what it should, however it is cut; any text whatever is parsed without a fault."""

from __future__ import annotations

import json
import time
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.parsing.answer import parse_answer
from serving.parsing.deltas import ContentDelta, ToolCallDelta
from serving.parsing.formats import TOOL_FORMATS, AnswerFormat, answer_format
from serving.parsing.reasoning import REASONING_STYLES
from tests.parsing.corpus import CASES, NAMES, TOOLS, Case, named, run, shown

_MARKS = (
    "<tool_call>", "</tool_call>", "<think>", "</think>", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<|python_tag|>", "{", "}", "[", "]", "(", ")", '"', "'", '"""', "\\", ",", ":", ";", "=", " ", "\n", "<", "1", "-",
    "e", ".", '{"name": "f", "arguments": {', '{"name": "g", "parameters": {', '"a": 1}}', "f(", "g(a=", "null",
    "é", "x", "\ud800", "\x00",
)  # fmt: skip
_TEXTS = st.lists(st.sampled_from(_MARKS) | st.text(max_size=3), max_size=30).map("".join)
_FORMATS: list[AnswerFormat] = [
    answer_format(tool_parser=tool, reasoning_parser=reasoning, tools=TOOLS, tool_choice=choice)
    for tool in (None, *TOOL_FORMATS)
    for reasoning in (None, *REASONING_STYLES)
    for choice in ("auto", "required", named("f"))
]


def _name(case: Case) -> str:
    return f"{case.parser}-{case.reasoning_parser or ''}-{case.text[:40]!r}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_corpus(case: Case) -> None:
    """Whole, by characters, and cut at each place: always the same."""
    answers = case.format
    assert shown(parse_answer(answers.parser(case.prompt), case.text)) == case.shown
    assert shown(run(answers.parser(case.prompt), case.text)) == case.shown
    text = case.text[:400]
    if text == case.text:
        for cut in range(len(text) + 1):
            assert shown(run(answers.parser(case.prompt), [text[:cut], "", text[cut:]])) == case.shown


@pytest.mark.parametrize("case", [case for case in CASES if len(case.text) <= 48], ids=_name)
def test_corpus_with_two_cuts(case: Case) -> None:
    """All pairs of cuts."""
    for first, second in combinations(range(len(case.text) + 1), 2):
        pieces = [case.text[:first], case.text[first:second], case.text[second:]]
        assert shown(run(case.format.parser(case.prompt), pieces)) == case.shown


def _cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


@given(st.sampled_from(_FORMATS), _TEXTS, st.lists(st.integers(0, 500), max_size=8))
def test_any_text_with_any_cuts(answers: AnswerFormat, text: str, cuts: list[int]) -> None:
    """Never a fault; cuts change nothing; without a call or reasoning, the content is the text."""
    whole = shown(parse_answer(answers.parser(), text))
    assert shown(run(answers.parser(), text)) == whole
    assert shown(run(answers.parser(), _cut(text, cuts))) == whole
    content, reasoning, calls = whole
    if reasoning is None and not calls and answers.reasoning is None:
        assert content == (text if answers.named is None else "")


@given(st.sampled_from(sorted(TOOL_FORMATS)), _TEXTS)
def test_deltas_are_well_formed(parser: str, text: str) -> None:
    """Calls are numbered from 0; the first delta of each has its id and name, no other has; no delta is empty."""
    machine = answer_format(tool_parser=parser, tools=TOOLS).parser()
    deltas = [delta for character in text for delta in machine.feed(character)] + machine.finish()
    begun = 0
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            assert (delta.id is None) == (delta.name is None)
            begun += delta.id is not None
            assert delta.index == begun - 1
            assert delta.id or delta.arguments
        else:
            assert delta.text


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
_WORDS = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
_CALLS = st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(_WORDS, _JSON, max_size=4)), min_size=1, max_size=3)


def _write(parser: str, calls: list[tuple[str, dict[str, Any]]], ascii_only: bool) -> str:
    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_only)

    if parser == "hermes":
        return "\n".join(
            f"<tool_call>\n{dump({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls
        )
    if parser == "llama3_json":
        return "; ".join(dump({"name": name, "parameters": arguments}) for name, arguments in calls)
    if parser == "mistral":
        if ascii_only:
            return "[TOOL_CALLS]" + dump([{"name": name, "arguments": arguments} for name, arguments in calls])
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{dump(arguments)}" for name, arguments in calls)
    inner = ", ".join(
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" for name, arguments in calls
    )
    return f"[{inner}]"


@given(st.sampled_from(sorted(TOOL_FORMATS)), _CALLS, st.booleans(), st.lists(st.integers(0, 500), max_size=5))
def test_calls_come_back(parser: str, calls: list[Any], ascii_only: bool, cuts: list[int]) -> None:
    """What is written in a format is read from it: names and arguments, whatever is in them."""
    answers = answer_format(tool_parser=parser, tools=TOOLS)
    answer = run(answers.parser(), _cut(_write(parser, calls, ascii_only), cuts))
    assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == calls
    assert answer.content is None
    assert len({call.id for call in answer.tool_calls}) == len(calls)


def test_streams_as_soon_as_certain() -> None:
    """The name comes before the arguments end, and arguments come as they are written."""
    parser = answer_format(tool_parser="hermes", tools=TOOLS).parser()
    assert parser.feed("Hi <tool") == [ContentDelta("Hi")]
    assert parser.feed('_call>{"name": "f", "arguments":') == []
    (delta,) = parser.feed(' {"a"')
    assert isinstance(delta, ToolCallDelta)
    assert (delta.index, delta.name, delta.arguments) == (0, "f", '{"a"')
    assert parser.feed(': "x ') == [ToolCallDelta(0, None, None, ': "x ')]


def test_ids() -> None:
    """Mistral's have 9 letters or digits, or are what the model says; others are OpenAI's."""
    mistral = answer_format(tool_parser="mistral", tools=TOOLS)
    (call,) = run(mistral.parser(), "[TOOL_CALLS]f[ARGS]{}").tool_calls
    assert len(call.id) == 9 and call.id.isalnum()
    (call,) = run(mistral.parser(), "[TOOL_CALLS]f[CALL_ID]abcdefgh1[ARGS]{}").tool_calls
    assert call.id == "abcdefgh1"
    (call,) = run(answer_format(tools=TOOLS, tool_choice=named("f")).parser(), "{}").tool_calls
    assert call.id.startswith("call_") and len(call.id) == 29


def test_special_tokens() -> None:
    """Where marks may be special tokens, they must be asked for."""
    assert not answer_format(tool_parser="hermes", tools=TOOLS).skip_special_tokens
    assert answer_format(tool_parser="hermes").skip_special_tokens
    assert answer_format(tool_parser="pythonic", reasoning_parser="qwen3", tools=TOOLS).skip_special_tokens
    assert not answer_format(reasoning_parser="mistral").skip_special_tokens


def test_constrained_answers_are_content() -> None:
    """A grammar of the request's own leaves no room for reasoning or calls."""
    answers = answer_format(tool_parser="llama3_json", reasoning_parser="deepseek_r1", tools=TOOLS, constrained=True)
    assert run(answers.parser(), '{"name": "f", "parameters": {}}').content == '{"name": "f", "parameters": {}}'


def test_unknown_names() -> None:
    """There is no such parser, no such tool."""
    with pytest.raises(KeyError):
        answer_format(tool_parser="nope")
    with pytest.raises(KeyError):
        answer_format(reasoning_parser="nope")
    with pytest.raises(KeyError):
        answer_format(tools=TOOLS, tool_choice=named("nope"))


_HUGE = {
    "hermes": ('<tool_call>{"name": "f", "arguments": {"a": "', '\\n é"}}</tool_call>'),
    "llama3_json": ('{"parameters": {"a": "', '"}, "name": "f"}'),
    "mistral": ('[TOOL_CALLS]f[ARGS]{"a": "', '"}'),
    "pythonic": ('[f(a="', '")]'),
    "spaces": ("a", "b"),
    "no call": ('<tool_call>{"', "<tool_call>"),
    "never closed": ("<tool_call>" * 3, ""),
}


def _seconds(kind: str, size: int, by_character: bool) -> float:
    parser = answer_format(tool_parser=kind if kind in TOOL_FORMATS else "hermes", tools=TOOLS).parser()
    before, after = _HUGE[kind]
    unit = {"spaces": " ", "no call": "<tool_call>", "never closed": '<tool_call>{"a<'}.get(kind, "x")
    text = before + unit * (size // len(unit)) + after
    start = time.process_time()
    run(parser, text if by_character else [text])
    return time.process_time() - start


@pytest.mark.parametrize("kind", sorted(_HUGE))
@pytest.mark.parametrize("by_character", [True, False])
def test_linear_time(kind: str, by_character: bool) -> None:
    """Eight times the text takes about eight times as long, not 64 times; best of three on a busy machine."""
    size = 8_000 if by_character else 80_000
    small = min(_seconds(kind, size, by_character) for _ in range(3))
    large = min(_seconds(kind, 8 * size, by_character) for _ in range(3))
    assert large < 24 * small + 0.05
