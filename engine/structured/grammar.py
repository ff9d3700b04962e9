"""From `StructuredOutputsParams` to the grammar text that llguidance compiles."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, StructTag, grammar_from

from engine.structured.params import StructuredOutputsParams, refuse
from engine.structured.schema import close_objects

TokenId = Callable[[str], int | None]  # id of a token that was added to the vocabulary, by its text

# llguidance reads this attribute of a rule and leaves it to the sampler, which has one temperature per request.
_RULE_TEMPERATURE = re.compile(r"^\s*\w+\s*\[[^\]\n]*\btemperature\s*=", re.MULTILINE)


def grammar_text(params: StructuredOutputsParams, added_token_id: TokenId) -> str:
    """llguidance's text of a grammar. Whether the grammar is sound shows when it is compiled.

    Args:
        params: validated.
        added_token_id: tells which triggers of a structural tag are tokens of their own.

    Raises:
        InvalidRequestError: the grammar is in a form that is not supported.
    """
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        # One terminal: its alternatives become one automaton, also if one choice begins another.
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, params.choice))}")
    if params.grammar is not None:
        return _lark(params.grammar)
    if params.structural_tag is not None:
        assert isinstance(params.structural_tag, str), "made text on construction"
        return StructTag.to_grammar(**_tags(json.loads(params.structural_tag), added_token_id))
    schema = {"type": "object"} if params.json is None else json.loads(str(params.json))
    if isinstance(schema, bool):  # options can be put into objects only
        schema = {} if schema else {"enum": []}
    if params.disable_additional_properties:
        schema = close_objects(schema)
    options: dict[str, Any] = {}
    if params.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)  # type: ignore[arg-type]


def _lark(text: str) -> str:
    """A Lark grammar as it is; one in GBNF (`root ::= …`), which llama.cpp and XGrammar use, is translated."""
    if _RULE_TEMPERATURE.search(text):
        raise refuse("a grammar's rules may have no temperature of their own; the request has one.")
    if "::=" not in text:
        return LLMatcher.grammar_from_lark(text)
    try:
        return grammar_from("grammar", text)
    except ValueError as error:
        raise refuse(f"the grammar is invalid: {error}.") from None


def _tags(document: dict[str, Any], added_token_id: TokenId) -> dict[str, Any]:
    """The arguments of `StructTag.to_grammar`."""
    structures, triggers = _structures(document)
    tags, plain_brackets = [], []
    for structure in structures:
        begin, end, schema = (structure.get(key) for key in ("begin", "end", "schema"))
        if not isinstance(begin, str) or not isinstance(end, str) or not isinstance(schema, dict):
            raise refuse(f"a structure of structural_tag needs texts begin and end, and a schema; got {structure!r}.")
        trigger = next((t for t in triggers if begin.startswith(t)), None)
        if trigger is None:
            raise refuse(f"structural_tag: {begin!r} begins with none of the triggers {triggers!r}.")
        token = added_token_id(trigger)
        if token is not None:  # llguidance's spelling of a token by its id
            begin, trigger = f"<[{token}]>{begin[len(trigger) :]}", f"<[{token}]>"
        elif trigger.startswith("<") and trigger.endswith(">"):
            plain_brackets.append(trigger)
        tags.append(StructTag(trigger=trigger, begin=begin, grammar=schema, end=end))
    has_tokens = any(tag.trigger.startswith("<[") for tag in tags)
    if has_tokens and plain_brackets:
        raise refuse(f"structural_tag mixes triggers that are tokens with others in <>: {plain_brackets!r}.")
    return {"tags": tags, "assume_special": has_tokens}


def _structures(document: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Structures and triggers, of either spelling: vLLM's first one, or XGrammar's `format` of triggered tags."""
    form = document.get("format")
    if form is None:
        structures, triggers = document.get("structures"), document.get("triggers")
    else:
        kind = form.get("type") if isinstance(form, dict) else form
        if kind != "triggered_tags" or form.get("at_least_one") or form.get("stop_after_first"):
            raise refuse(
                "structural_tag supports the format triggered_tags, without at_least_one and stop_after_first; "
                f"got {kind!r}."
            )
        structures, triggers = [_from_tag(tag) for tag in form.get("tags") or []], form.get("triggers")
    if not isinstance(structures, list) or not structures or not all(isinstance(s, dict) for s in structures):
        raise refuse("structural_tag needs a non-empty list of structures.")
    if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
        raise refuse("structural_tag needs a non-empty list of triggers, each a non-empty text.")
    return structures, triggers


def _from_tag(tag: Any) -> dict[str, Any]:
    content = tag.get("content") if isinstance(tag, dict) else None
    if not isinstance(content, dict) or content.get("type") != "json_schema":
        raise refuse(f"a tag of structural_tag must have content of type json_schema, got {content!r}.")
    return {"begin": tag.get("begin"), "end": tag.get("end"), "schema": content.get("json_schema")}
