"""Compiling and walking grammars, without a model: every kind, every kind of tokenizer, every fault by name."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken

from engine.errors import InvalidRequestError
from engine.structured.compiler import CACHE_SIZE, GrammarCompiler
from engine.structured.matcher import GrammarMatcher, MatcherState
from engine.structured.params import StructuredOutputsParams
from engine.text.tokenizer import Tokenizer
from models.loading.gguf_file import GgufFile
from models.loading.gguf_tokenizer import gguf_tokenizer
from tests.engine.helpers import TINY, VOCAB
from tests.models.test_gguf_tokenizer import byte_level_metadata, sentence_piece_metadata
from tests.structured.helpers import allowed, follows, walk
from tests.structured.schemas import NUM_SCHEMAS, collection

EOS = 2
COMPACT = {"disable_any_whitespace": True}


def structured(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"json": {"type": "foo"}}, "Invalid type: foo"),
    ({"json": {"type": "string", "pattern": "("}}, "unclosed group"),
    ({"json": {"type": "string", "pattern": "(?=a)"}}, "look-ahead"),
    ({"json": {"type": "string", "format": "zzz"}}, "Unknown format: zzz"),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 2}}, "Unsatisfiable"),
    ({"json": {"enum": []}}, "Unsatisfiable"),
    ({"json": False}, "Unsatisfiable"),
    ({"json": {"$ref": "#/$defs/x"}}, "does not exist"),
    ({"json": {"$ref": "http://example.com/schema"}}, "Resource 'http://example.com/schema'"),
    ({"json": {"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}}, "no text satisfies"),
    ({"json": {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}}, "oneOf"),
    ({"json": {"type": "object", "not": {}}}, 'Unimplemented keys: ["not"]'),
    ({"json": {"if": {}, "then": {}}}, 'Unimplemented keys: ["if", "then"]'),
    ({"json": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: ["uniqueItems"]'),
    ({"json": {"type": "array", "contains": {}}}, 'Unimplemented keys: ["contains"]'),
    ({"json": {"type": "object", "propertyNames": {"pattern": "a"}}}, 'Unimplemented keys: ["propertyNames"]'),
    ({"json": {"dependentRequired": {"a": ["b"]}}}, 'Unimplemented keys: ["dependentRequired"]'),
    ({"json": {"type": "string"}, "whitespace_pattern": "("}, "json cannot be used"),
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": r"(a)\1"}, "backreferences are not supported"),
    ({"regex": r"\bfoo\b"}, "lookarounds not supported"),
    ({"regex": "[a&&b]"}, "no text satisfies"),
    ({"grammar": "start: a"}, 'unknown name: "a"'),
    ({"grammar": "a: /x/"}, "start"),
    ({"grammar": "start: A\nA: /[0-9/"}, "unclosed character class"),
    ({"grammar": "start: <tool>"}, 'unknown special token: "<tool>"'),
    ({"grammar": "start: x\nx[temperature=0.5]: /a*/"}, "no temperature"),
    ({"grammar": "root ::= ("}, "grammar"),
    ({"structural_tag": {}}, "non-empty list of structures"),
    ({"structural_tag": {"structures": [{"begin": "<f>", "end": "", "schema": {}}]}}, "triggers"),
    ({"structural_tag": {"structures": [{"begin": "<f>", "end": ""}], "triggers": ["<"]}}, "a schema"),
    ({"structural_tag": {"structures": [{"begin": "f", "end": "", "schema": {}}], "triggers": ["<"]}}, "none of the"),
    ({"structural_tag": {"format": {"type": "any_text"}}}, "'any_text'"),
    ({"structural_tag": {"format": {"type": "triggered_tags", "at_least_one": True}}}, "at_least_one"),
    (
        {"structural_tag": {"format": {"type": "triggered_tags", "tags": [{"content": {"type": "any_text"}}]}}},
        "content of type json_schema",
    ),
]


@pytest.mark.parametrize(("fields", "says"), BAD)
def test_bad_grammars(compiler: GrammarCompiler, fields: dict[str, Any], says: str) -> None:
    params = structured(**fields)
    for _ in range(2):  # the second time from the cache, if faults were kept
        with pytest.raises(InvalidRequestError) as caught:
            compiler.matcher(params)
        assert says in str(caught.value)
        assert caught.value.parameter == "structured_outputs"
        assert "\n" not in str(caught.value)


GOOD: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"regex": "ab?c"}, ["ac", "abc"], ["abbc", "ab", "xac"]),
    ({"regex": "^a|b$"}, ["a", "b"], ["ab"]),
    ({"regex": r"\d{3}-[é日]+"}, ["123-é日日"], ["12-é", "123-"]),
    ({"choice": ["a", "ab", 'q"\\\n\t/é日', "x y"]}, ["a", "ab", 'q"\\\n\t/é日', "x y"], ["b", "aab", "q", ""]),
    ({"grammar": 'start: "a" start "b" | "c"'}, ["c", "acb", "aacbb"], ["acbb", "ab"]),
    ({"grammar": "?start: NUMBER\n%import common.NUMBER"}, ["12", "1.5"], ["x"]),
    ({"grammar": 'root ::= "a" digit+\ndigit ::= [0-9]'}, ["a1", "a123"], ["a", "1"]),
    ({"json_object": True}, ["{}", '{"a": [1, null]}', '{"a":1}'], ["[]", "1", "{"]),
    ({"json_object": True, **COMPACT}, ["{}", '{"a":[1,null]}'], ['{"a": 1}', "{ }"]),
    ({"json": {"type": "array"}, "whitespace_pattern": "_*"}, ["[1,_2]", "[1,2]"], ["[1, 2]"]),
    ({"json": {"properties": {"a": {"type": "null"}}, "type": "object"}}, ['{"a":null,"b":1}'], ['{"a":1}']),
    (
        {"json": {"properties": {"a": {"type": "null"}}, "type": "object"}, "disable_additional_properties": True},
        ['{"a":null}', "{}"],
        ['{"a":null,"b":1}', '{"b":1}'],
    ),
    (
        {
            "structural_tag": {
                "structures": [{"begin": "<f=a>", "end": "</f>", "schema": {"type": "integer"}}],
                "triggers": ["<f="],
            }
        },
        ["no call", "x <f=a>12</f> y <f=a>3</f>", ""],
        ["<f=a>x</f>", "<f=b>", "<f=a>1"],
    ),
    (
        {
            "structural_tag": json.dumps(
                {
                    "type": "structural_tag",
                    "format": {
                        "type": "triggered_tags",
                        "triggers": ["[f]"],
                        "tags": [
                            {
                                "begin": "[f]",
                                "end": "!",
                                "content": {"type": "json_schema", "json_schema": {"const": 1}},
                            }
                        ],
                    },
                }
            )
        },
        ["text", "[f]1! and [f]1!"],
        ["[f]2!"],
    ),
]


@pytest.mark.parametrize(("fields", "good", "bad"), GOOD)
def test_what_a_grammar_accepts(
    compiler: GrammarCompiler, tokenizer: Tokenizer, fields: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    params = structured(**fields)
    assert [text for text in good if not follows(compiler, params, tokenizer, text)] == []
    assert [text for text in bad if follows(compiler, params, tokenizer, text)] == []


def test_triggers_that_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    tokenizer = Tokenizer.from_directory(TINY / "llama")
    tokenizer.backend.add_tokens([AddedToken("[CALL]", special=False, normalized=False)])
    tokenizer = Tokenizer(tokenizer.backend, tokenizer.special_tokens, {})
    compiler = GrammarCompiler(tokenizer, VOCAB + 1, (EOS,))
    tag = {"structures": [{"begin": "[CALL]x", "end": ".", "schema": {"const": 1}}], "triggers": ["[CALL]"]}
    params = structured(structural_tag=tag)
    assert tokenizer.encode("[CALL]") == [VOCAB]
    assert follows(compiler, params, tokenizer, "a [CALL]x1. b")
    assert not follows(compiler, params, tokenizer, "a [CALL]y1.")
    tag["structures"].append({"begin": "<f>", "end": ".", "schema": {"const": 1}})  # type: ignore[union-attr]
    with pytest.raises(InvalidRequestError, match="mixes triggers"):
        compiler.matcher(structured(structural_tag={**tag, "triggers": ["[CALL]", "<f>"]}))


def test_the_collection_has_its_size() -> None:
    assert len(collection()) == NUM_SCHEMAS
    for schema in collection().values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_random_walks_through_schemas_give_valid_json(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    rng, complete = np.random.default_rng(0), 0
    for schema in collection().values():
        text = tokenizer.decode(walk(compiler, structured(json=schema, **COMPACT), rng, 400))
        try:
            value = json.loads(text)
        except ValueError:
            continue  # cut at the most tokens
        complete += 1
        jsonschema.validate(value, schema, jsonschema.Draft202012Validator)
    assert complete > 0.8 * NUM_SCHEMAS


TOKENIZERS = {
    "byte_level_gguf": lambda: gguf_tokenizer(GgufFile(Path("m.gguf"), byte_level_metadata(), {})).backend,
    "sentence_piece_gguf": lambda: gguf_tokenizer(GgufFile(Path("m.gguf"), sentence_piece_metadata(), {})).backend,
}


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece", *TOKENIZERS])
def test_kinds_of_tokenizers(kind: str, request: pytest.FixtureRequest) -> None:
    """The tokens' bytes are what the text of an output is made of."""
    tokenizer = Tokenizer(TOKENIZERS[kind](), {}, {}) if kind in TOKENIZERS else request.getfixturevalue(kind)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, (EOS,))
    assert compiler.unsupported is None
    params, rng, texts = structured(regex="(the |at ){1,3}[a-d]{2}"), np.random.default_rng(1), set()
    for _ in range(20):
        tokens = walk(compiler, params, rng, 60)
        # After a token of the prompt: SentencePiece's decoder strips the first space of a text.
        prompt = tokenizer.encode("a", add_special_tokens=False)
        text = tokenizer.decode([*prompt, *tokens]).removeprefix(tokenizer.decode(prompt))
        assert re.fullmatch("(the |at ){1,3}[a-d]{2}", text), (tokens, text)
        texts.add(text)
    assert len(texts) > 5


def test_a_tokenizer_that_cannot_be_used(word_piece: Tokenizer) -> None:
    compiler = GrammarCompiler(word_piece, word_piece.vocab_size, (1,))
    with pytest.raises(InvalidRequestError, match="its tokenizer cannot be used with grammars: .*WordPiece"):
        compiler.matcher(structured(regex="a"))


def test_a_model_without_an_end(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, ())
    own = tokenizer.eos_token_id
    assert own is not None and compiler.eos_token_ids == (own,)
    endless = Tokenizer(tokenizer.backend, {}, {})
    with pytest.raises(InvalidRequestError, match="no end-of-sequence token"):
        GrammarCompiler(endless, VOCAB, ()).matcher(structured(regex="a"))


def test_every_end_token_may_end_and_padding_may_nothing(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, 400, (0, EOS))
    matcher = compiler.matcher(structured(regex="(.|\\n)*"))
    tokens = allowed(matcher, 400)
    assert {0, EOS} <= set(tokens) and 1 not in tokens and max(tokens) < VOCAB
    assert matcher.accept([0]) and matcher.state is MatcherState.COMPLETE


def test_matchers_accept_roll_back_and_fail(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(structured(regex="ab[0-9]{4}"))
    start = allowed(matcher, VOCAB)
    ids = tokenizer.encode("ab12")
    assert matcher.accept(ids[:2])
    after_two = allowed(matcher, VOCAB)
    assert matcher.accept(ids[2:]) and allowed(matcher, VOCAB) == after_two  # digits all the way
    assert not matcher.is_accepting
    matcher.rollback(len(ids) - 2)
    assert allowed(matcher, VOCAB) == after_two
    matcher.rollback(2)
    assert allowed(matcher, VOCAB) == start and matcher.state is MatcherState.OPEN
    with pytest.raises(ValueError, match="cannot take back 1 tokens"):
        matcher.rollback(1)
    failed = compiler.matcher(structured(regex="ab[0-9]{4}"))
    assert not failed.accept(tokenizer.encode("ax"))
    assert failed.state is MatcherState.FAILED and "satisfy the grammar" in failed.error


def test_matchers_of_one_grammar_share_nothing_that_moves(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    params = structured(regex="a*b")
    first, second = compiler.matcher(params), compiler.matcher(params)
    before = allowed(second, VOCAB)
    assert first.accept(tokenizer.encode("aab")) and first.state is MatcherState.COMPLETE
    assert allowed(second, VOCAB) == before == allowed(compiler.matcher(params), VOCAB)


def test_the_cache_is_bounded_and_used(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, (EOS,))
    every = [structured(regex=f"a{{{i}}}") for i in range(1, CACHE_SIZE + 10)]
    compiler.prepare([*every, None, every[0]])
    assert len(compiler._cache) == CACHE_SIZE
    assert compiler.submit(every[-1]) is compiler.submit(every[-1])
    assert isinstance(compiler.matcher(every[0]), GrammarMatcher)  # compiled anew


def test_many_threads_compile_the_same_and_others(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, (EOS,))

    def use(index: int) -> list[int]:
        return allowed(compiler.matcher(structured(regex=f"[a-{'bcd'[index % 3]}]x")), VOCAB)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(use, range(60)))
    assert all(results[i] == results[i % 3] for i in range(60))
    assert [len(r) for r in results[:3]] == [2, 3, 4]
