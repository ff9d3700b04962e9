"""Answers as models write them, and what an API is to show of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serving.parsing.answer import ParsedAnswer, collect
from serving.parsing.deltas import Delta, OutputParser
from serving.parsing.formats import AnswerFormat, answer_format

NAMES = ("f", "g", "get_weather", "find.near")
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in NAMES
]

Shown = tuple[str | None, str | None, list[tuple[str, str]]]  # content, reasoning, (name, arguments) of the calls


@dataclass(frozen=True)
class Case:
    """A text and what it means: content, calls as (name, arguments), reasoning."""

    parser: str | None
    text: str
    content: str | None
    calls: tuple[tuple[str, str], ...] = ()
    reasoning: str | None = None
    reasoning_parser: str | None = None
    prompt: str = ""
    tool_choice: Any = None
    parallel: bool = True

    @property
    def format(self) -> AnswerFormat:
        """How it is read."""
        return answer_format(
            tool_parser=self.parser,
            reasoning_parser=self.reasoning_parser,
            tools=TOOLS,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel,
        )

    @property
    def shown(self) -> Shown:
        """What is expected."""
        return self.content, self.reasoning, list(self.calls)


def shown(answer: ParsedAnswer) -> Shown:
    """An answer without the ids of its calls, which are random."""
    return answer.content, answer.reasoning, [(call.name, call.arguments) for call in answer.tool_calls]


def run(parser: OutputParser, pieces: list[str] | str) -> ParsedAnswer:
    """Feed pieces (the characters of a str), check the form of each delta, and collect."""
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += parser.feed(piece)
    return collect(deltas + parser.finish())


def named(name: str) -> dict[str, Any]:
    """OpenAI's tool_choice of one function."""
    return {"type": "function", "function": {"name": name}}


_F = '{"name": "f", "arguments": {"a": 1}}'
HERMES = (
    Case("hermes", "", ""),
    Case("hermes", "Just text, 1 < 2.\n", "Just text, 1 < 2.\n"),
    Case("hermes", f"<tool_call>\n{_F}\n</tool_call>", None, (("f", '{"a": 1}'),)),
    Case("hermes", f"Wait.\n\n<tool_call>\n{_F}\n</tool_call>\n", "Wait.", (("f", '{"a": 1}'),)),
    Case("hermes", f"Wait.\n<tool_call>{_F}</tool_call>\nDone.", "Wait.\nDone.", (("f", '{"a": 1}'),)),
    Case("hermes", f"<tool_call>{_F}</tool_call>\nDone. ", "Done.", (("f", '{"a": 1}'),)),
    Case(
        "hermes",
        f'<tool_call>{_F}</tool_call>\n<tool_call>{{"name": "g", "arguments": {{}}}}</tool_call>',
        None,
        (("f", '{"a": 1}'), ("g", "{}")),
    ),
    # two in one tag, a missing end tag, surplus and missing brackets: all seen of real models
    Case("hermes", f"<tool_call>\n{_F}\n{_F}\n</tool_call>", None, (("f", '{"a": 1}'),) * 2),
    Case("hermes", f"<tool_call>{_F}<tool_call>{_F}", None, (("f", '{"a": 1}'),) * 2),
    Case("hermes", f"<tool_call>{_F}}}\n</tool_call>ok", "ok", (("f", '{"a": 1}'),)),
    Case("hermes", f"<tool_call>{_F[:-1]}\n</tool_call>ok", "ok", (("f", '{"a": 1}'),)),
    Case("hermes", f"<tool_call>{_F}</tool_cat>", "</tool_cat>", (("f", '{"a": 1}'),)),
    Case("hermes", f"<tool_call>{_F}</tool_", "</tool_", (("f", '{"a": 1}'),)),
    # keys in other orders, more keys, arguments as a string, as null, or missing
    Case("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', None, (("f", '{"a": 1}'),)),
    Case("hermes", '<tool_call>{"id": 7, "name": "f", "arguments": {}, "x": [{}]}</tool_call>', None, (("f", "{}"),)),
    Case(
        "hermes",
        r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\\n\"}"}</tool_call>',
        None,
        (("f", r'{"a": "\n"}'),),
    ),
    Case("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', None, (("f", "{}"),)),
    Case("hermes", '<tool_call>{"name": "f"}</tool_call>', None, (("f", "{}"),)),
    Case(
        "hermes",
        '<tool_call>{"name": "f", "name": "g", "arguments": {}, "arguments": 3}</tool_call>',
        None,
        (("f", "{}"),),
    ),
    # nested, escaped, foreign; the end tag inside a string ends nothing
    Case(
        "hermes",
        '<tool_call>{"name": "f", "arguments": '
        '{"a": [{"b": "}\\"</tool_call>"}, -1e+3], "é": "日 \\u00e9"}}</tool_call>',
        None,
        (("f", '{"a": [{"b": "}\\"</tool_call>"}, -1e+3], "é": "日 \\u00e9"}'),),
    ),
    # malformed: no call, so content as it stands
    Case("hermes", "<tool_call>nope</tool_call> x", "<tool_call>nope</tool_call> x"),
    Case("hermes", '<tool_call>{"name": f}</tool_call>', '<tool_call>{"name": f}</tool_call>'),
    Case("hermes", '<tool_call>{"name": ""}</tool_call>', '<tool_call>{"name": ""}</tool_call>'),
    Case("hermes", '<tool_call>{"name": "\\ud800"}', '<tool_call>{"name": "\\ud800"}'),
    Case("hermes", '<tool_call>{"name": 3, "arguments": {}}', '<tool_call>{"name": 3, "arguments": {}}'),
    Case("hermes", '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>'),
    Case("hermes", '<tool_call>{"name": "f", "arguments": 3}', '<tool_call>{"name": "f", "arguments": 3}'),
    Case("hermes", '<tool_call>{"name": "f", "arguments": "x"}', '<tool_call>{"name": "f", "arguments": "x"}'),
    Case("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu'),
    Case("hermes", f"<tool_call>\n<tool_call>{_F}</tool_call>", "<tool_call>", (("f", '{"a": 1}'),)),
    Case("hermes", "a <tool_ca", "a <tool_ca"),
    Case("hermes", "a <tool_call> \n", "a <tool_call> \n"),
    # cut off, or no JSON, after the call became certain: the arguments are what there is
    Case("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x', None, (("f", '{"a": "x'),)),
    Case("hermes", '<tool_call>{"name": "f", "arguments": {"a": x}}</tool_call>ok', "ok", (("f", '{"a": x}}'),)),
    Case("hermes", '<tool_call>{"name": "f", "arguments": {a}</tool_', None, (("f", "{a}</tool_"),)),
    Case("hermes", f"<tool_call>{_F}</tool_call>" * 3, None, (("f", '{"a": 1}'),), parallel=False),
)
_P = '{"name": "f", "parameters": {"a": 1}}'
LLAMA3 = (
    Case("llama3_json", _P, None, (("f", '{"a": 1}'),)),
    Case("llama3_json", f"<|python_tag|>{_P}", None, (("f", '{"a": 1}'),)),
    Case("llama3_json", f"\n{_P}; {_P};{_P} ;", None, (("f", '{"a": 1}'),) * 3),
    Case("llama3_json", f"{_P}\n{_P}\nThere.", "There.", (("f", '{"a": 1}'),) * 2),
    Case("llama3_json", f"Sure. <|python_tag|>{_P}", "Sure.", (("f", '{"a": 1}'),)),
    Case("llama3_json", '{"type": "function", "name": "g", "parameters": {}}', None, (("g", "{}"),)),
    Case("llama3_json", f"Sure. {_P}", f"Sure. {_P}"),
    Case("llama3_json", '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}'),
    Case("llama3_json", '{"name": "f"}', '{"name": "f"}'),
    Case("llama3_json", ' {"answer": [1, 2]}\n', ' {"answer": [1, 2]}\n'),
    Case("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)"),
    Case("llama3_json", f"{_P}; then", "; then", (("f", '{"a": 1}'),)),
    Case("llama3_json", f"{_P};; {_P}", f";; {_P}", (("f", '{"a": 1}'),)),
    Case("llama3_json", f'{_P}; {{"name": "q"', '; {"name": "q"', (("f", '{"a": 1}'),)),
    Case("llama3_json", '{"name": "f", "parameters": {a}}; x', None, (("f", "{a}}; x"),)),
    Case("llama3_json", "<|python", "<|python"),
)
MISTRAL = (
    Case("mistral", f"[TOOL_CALLS][{_F}]", None, (("f", '{"a": 1}'),)),
    Case("mistral", f"[TOOL_CALLS] [{_F}, {_F}] ok", "ok", (("f", '{"a": 1}'),) * 2),
    Case("mistral", f"Hm. [TOOL_CALLS]{_F}", "Hm.", (("f", '{"a": 1}'),)),
    Case("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}', None, (("f", '{"a": 1}'),)),
    Case("mistral", 'A [TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS] {}', "A", (("f", '{"a": 1}'), ("g", "{}"))),
    Case("mistral", "[TOOL_CALLS]f[CALL_ID]abcdefgh1[ARGS]{}", None, (("f", "{}"),)),
    Case("mistral", '[TOOL_CALLS]f[ARGS]{"a": "[TOOL_CALLS]"', None, (("f", '{"a": "[TOOL_CALLS]"'),)),
    Case("mistral", "[TOOL_CALLS]f[ARGS]{a}[TOOL_CALLS]g[ARGS]{}", None, (("f", "{a}"), ("g", "{}"))),
    Case("mistral", "[TOOL_CALLS]f[TOOL_CALLS]g[ARGS]{}", "[TOOL_CALLS]f", (("g", "{}"),)),
    Case("mistral", "[TOOL_CALLS]f[ARGX]", "[TOOL_CALLS]f[ARGX]"),
    Case("mistral", "[TOOL_CALLS]f[AR", "[TOOL_CALLS]f[AR"),
    Case("mistral", "[TOOL_CALLS]!", "[TOOL_CALLS]!"),
    Case("mistral", "[TOOL_CALLS]f x", "[TOOL_CALLS]f x"),
    Case("mistral", "[TOOL_CALLS][1]", "[TOOL_CALLS][1]"),
    Case("mistral", f"[TOOL_CALLS][{_F}, 1]", ", 1]", (("f", '{"a": 1}'),)),
    Case("mistral", f"[TOOL_CALLS][{_F} {_F}]", _F + "]", (("f", '{"a": 1}'),)),
    Case("mistral", "a [TOOL", "a [TOOL"),
    Case("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a', None, (("f", '{"a'),)),
)
PYTHONIC = (
    Case("pythonic", "[f(a=1)]", None, (("f", '{"a": 1}'),)),
    Case("pythonic", '\n[f(a=-1, b="x, )]"), g()] ok', "ok", (("f", '{"a": -1, "b": "x, )]"}'), ("g", "{}"))),
    Case("pythonic", "[find.near(x=(1, 2.5), y={'k': [None, True]},)]", None,
         (("find.near", '{"x": [1, 2.5], "y": {"k": [null, true]}}'),)),
    Case("pythonic", "[f(a='it\\'s', b=\"\"\"q\"'\n\"\"\", c='', d=true)]", None,
         (("f", '{"a": "it\'s", "b": "q\\"\'\\n", "c": "", "d": true}'),)),
    Case("pythonic", "[f(from='é日😀', class=null)]", None, (("f", '{"from": "é日😀", "class": null}'),)),
    Case("pythonic", "[f(a='\\ud800')]", None, (("f", '{"a": "\\ud800"}'),)),
    Case("pythonic", "[f(a=1), g(b=open('x'))] z", ", g(b=open('x'))] z", (("f", '{"a": 1}'),)),
    Case("pythonic", "[f(a=1), g(b=2", ", g(b=2", (("f", '{"a": 1}'),)),
    Case("pythonic", "[f(a=1) g()]", "g()]", (("f", '{"a": 1}'),)),
    *(
        Case("pythonic", text, text)
        for text in (
            "Sure: [f(a=1)]", "[1, 2]", "[foo](http://x)", "[q(a=1)]", "[f(1)]", "[f(a==1)]", "[f(a=1, a=2)]", "[f(,)]",
            "[f(a=1", "[f(a=1e999)]", "[f(a={1: 2})]", "[f(a=b'x')]", "[f(a={1})]", "[f(a=f'{x}')]", "[f(a=-True)]",
            "[f(a=)]", "[f(a=1}]", "[f(a='x\n')]", "[f(**x)]", "[f(a=1j)]", "[f(a=...)]", "[f(a=(]", "[f(a=" + "[" * 80,
            "[f", "[", "[f(a=" + "9" * 5000 + ")]", "[f(a=" + "-" * 3000 + "1)]", "[f(a=\0)]",
        )
    ),
)  # fmt: skip
_CALL = f"<tool_call>{_F}</tool_call>"
REASONING = tuple(
    Case("hermes", *case[:4], reasoning_parser=case[4], prompt=case[5] if len(case) > 5 else "")
    for case in (
        ("<think>\nhm\n</think>\n\nHi.\n", "Hi.\n", (), "hm", "qwen3"),
        (f"\n<think>hm</think>{_CALL}", None, (("f", '{"a": 1}'),), "hm", "qwen3"),
        (f"<think>{_CALL}</think>x", "x", (), _CALL, "qwen3"),
        ("<think>\n\n</think>\n\nHi", "Hi", (), None, "qwen3"),
        ("<think>never ends </thin", None, (), "never ends </thin", "qwen3"),
        ("No <think>x</think>", "No <think>x</think>", (), None, "qwen3"),
        ("  <thinly", "  <thinly", (), None, "qwen3"),
        (" <th", " <th", (), None, "qwen3"),
        ("hm\n</think>\n\nHi", "Hi", (), "hm", "qwen3", "<|im_start|>assistant\n<think>\n"),
        ("Hi", "Hi", (), None, "qwen3", "<think>\n\n</think>\n\n"),
        ("hm\n\nso</think>Hi", "Hi", (), "hm\n\nso", "deepseek_r1"),
        ("<think>hm</think>Hi", "Hi", (), "hm", "deepseek_r1"),
        ("only thoughts\n", None, (), "only thoughts", "deepseek_r1"),
        ("Hi", "Hi", (), None, "deepseek_r1", "<think>\n\n</think>\n\n"),
        ("<thi", None, (), "<thi", "deepseek_r1"),
        ("", "", (), None, "deepseek_r1"),
        ("[THINK]hm[/THINK]Hi", "Hi", (), "hm", "mistral"),
        ("<think></think><think>x", "<think>x", (), None, "qwen3"),
    )
)
_R = '{"name": "f", "parameters": {"a": 1}}'
FORCED = (
    Case(None, f"[{_R}]", None, (("f", '{"a": 1}'),), tool_choice="required"),
    Case("hermes", f"[{_R}, {_R}]", None, (("f", '{"a": 1}'),) * 2, tool_choice="required"),
    Case("hermes", f'[{_R}, {{"name": "g"', ', {"name": "g"', (("f", '{"a": 1}'),), tool_choice="required"),
    Case("hermes", "I won't.", "I won't.", tool_choice="required"),
    Case("hermes", '{"a": 1}', None, (("g", '{"a": 1}'),), tool_choice=named("g")),
    Case("hermes", '\n{"a": "<tool_call>', None, (("g", '{"a": "<tool_call>'),), tool_choice=named("g")),
    Case("hermes", "", "", tool_choice=named("g")),
    Case("hermes", _CALL, _CALL, tool_choice="none"),
    Case(None, _CALL, _CALL),
)  # fmt: skip
CASES = HERMES + LLAMA3 + MISTRAL + PYTHONIC + REASONING + FORCED
