"""Bad sampling parameters: one clear error each, that names the field, the value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.engine import Engine
from engine.errors import InvalidRequestError
from engine.sampling_params import SamplingParams
from tests.engine.helpers import VOCAB

NAN, INF = math.nan, math.inf
HUGE = 10**400  # an integer that no float can hold
NOT_FINITE = [NAN, INF, -INF, "0.5", None, True, [1.0], 1j]
NOT_WHOLE = [1.5, 2.0, "3", True, NAN, [1]]
NOT_A_SWITCH = [1, 0, "no", None]

# field -> [(values, what the message says is allowed)]
BAD: dict[str, list[tuple[list[Any], str]]] = {
    "n": [([0, -1, 16385, HUGE], "at least 1 and at most 16384"), ([*NOT_WHOLE, None], "integer")],
    "presence_penalty": [([-2.1, 3, HUGE], "[-2, 2]"), (NOT_FINITE, "finite number")],
    "frequency_penalty": [([-2.1, 3, -HUGE], "[-2, 2]"), (NOT_FINITE, "finite number")],
    "repetition_penalty": [([0, 0.0, -1.0], "(0, inf]"), (NOT_FINITE, "finite number")],
    "temperature": [([-0.1, 2.1, HUGE], "[0, 2]"), (NOT_FINITE, "finite number")],
    "top_p": [([0.0, -0.5, 1.01], "(0, 1]"), (NOT_FINITE, "finite number")],
    "top_k": [([-2, -HUGE], "at least -1"), ([*NOT_WHOLE, None], "integer")],
    "min_p": [([-0.01, 1.5], "[0, 1]"), (NOT_FINITE, "finite number")],
    "seed": [([2**63, -(2**63) - 1], "at least -9223372036854775808"), (NOT_WHOLE, "integer")],
    "stop": [([5, 1.5, {"a": 1}, True], "list"), ([[""], "", ["a", 5], [None], [b"x"]], "non-empty strings")],
    "stop_token_ids": [([5, "7", {7: 1}], "list"), ([["7"], [1.0], [True]], "integer"), ([[-1]], "at least 0")],
    "ignore_eos": [(NOT_A_SWITCH, "True or False")],
    "max_tokens": [([0, -5], "at least 1"), (NOT_WHOLE, "integer")],
    "min_tokens": [([-1], "at least 0"), ([17], "at most max_tokens=16"), ([*NOT_WHOLE, None], "integer")],
    "logprobs": [([-2], "at least -1"), (NOT_WHOLE, "integer")],
    "prompt_logprobs": [([-2], "at least -1"), (NOT_WHOLE, "integer")],
    "detokenize": [(NOT_A_SWITCH, "True or False")],
    "skip_special_tokens": [(NOT_A_SWITCH, "True or False")],
    "spaces_between_special_tokens": [(NOT_A_SWITCH, "True or False")],
    "include_stop_str_in_output": [(NOT_A_SWITCH, "True or False")],
    "skip_reading_prefix_cache": [(NOT_A_SWITCH, "True or False")],
    "output_kind": [(["DELTA", 1, None], "RequestOutputKind")],
    "logit_bias": [
        ([[1, 2], "5", 5], "token ids to numbers"),
        ([{"a": 1}, {1.5: 1}, {True: 1}, {None: 1}, {" 5": 1}, {"-5": 1}], "token ids"),
        ([{5: NAN}, {5: INF}, {5: "1"}, {5: None}, {5: True}], "finite number"),
        ([dict.fromkeys(range(1025), 1.0)], "at most 1024"),
    ],
    "allowed_token_ids": [
        ([5, "7"], "list"),
        ([[]], "must not be empty"),
        ([["7"], [1.0], [True]], "integer"),
        ([[-1]], "at least 0"),
        ([list(range(1025))], "at most 1024"),
    ],
    "bad_words": [
        (["word", 5], "list"),
        ([[""], [5], [None]], "non-empty strings"),
        ([["a"] * 129], "at most 128"),
    ],
    "structured_outputs": [([{"regex": "a"}, "[0-9]+", 5], "StructuredOutputsParams")],
}
CASES = [(field, value, allowed) for field, rows in BAD.items() for values, allowed in rows for value in values]


def spellings(value: Any) -> list[str]:
    """How a message may show what was wrong: the value itself; of a container one of its items, its size or type."""
    shown = [repr(value)]
    if isinstance(value, (list, dict)):
        items = value if isinstance(value, list) else [*value, *value.values()]
        shown += [f"got {item!r}" for item in items] + [f"got {len(value)}.", f"got {type(value).__name__}."]
    return shown if value != [] else ["empty"]


def test_every_field_has_bad_values() -> None:
    assert set(BAD) == set(SamplingParams.field_names())


@pytest.mark.parametrize(("field", "value", "allowed"), CASES, ids=lambda v: repr(v)[:20])
def test_a_bad_value_is_refused(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert caught.value.parameter is not None and caught.value.parameter.startswith(field)
    assert message.startswith(field) and allowed in message
    assert any(text in message for text in spellings(value)), message


@pytest.mark.parametrize(
    ("fields", "parameter", "says"),
    [
        ({"n": 2, "temperature": 0}, "n", "greedy"),
        ({"stop": "x", "detokenize": False}, "stop", "detokenize=True"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "max_tokens=3"),
        ({"stop_token_ids": list(range(129))}, "stop_token_ids", "at most 128 ids, got 129"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], parameter: str, says: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**fields)
    assert caught.value.parameter == parameter and says in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "parameter", "says"),
    [
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids", ["320", "0 to 319"]),
        ({"allowed_token_ids": [1, 5000]}, "allowed_token_ids", ["5000", "0 to 319"]),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias", ["320", "0 to 319"]),
        ({"logit_bias": {-1: 1.0}}, "logit_bias", ["-1", "0 to 319"]),
        ({"logit_bias": {HUGE: 1.0}}, "logit_bias", ["0 to 319"]),
        ({"logprobs": 21}, "logprobs", ["max_logprobs=20", "21"]),
        ({"logprobs": -1}, "logprobs", ["max_logprobs=20", "-1"]),
        ({"prompt_logprobs": 320}, "prompt_logprobs", ["max_logprobs=20", "320"]),
        ({"bad_words": ["   "]}, "bad_words", ["'   '"]),
        ({"bad_words": ["x" * 50]}, "bad_words", ["1 to 16 tokens", "50"]),
        ({"allowed_token_ids": [67], "bad_words": ["a"]}, "bad_words", ["every token of allowed_token_ids"]),
        ({"allowed_token_ids": [2], "min_tokens": 1}, "min_tokens", ["min_tokens=1", "only stop tokens"]),
        ({"min_tokens": 126, "max_tokens": None}, "min_tokens", ["min_tokens=126", "125 tokens"]),
    ],
)
def test_what_only_the_model_can_tell(fields: dict[str, Any], parameter: str, says: list[str], engine: Engine) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        engine.generate([[5], [6, 7, 8]], SamplingParams(**fields))
    assert caught.value.parameter == parameter
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_borders_are_allowed(engine: Engine) -> None:
    """The first values that are good, beside those that are not."""
    good: list[dict[str, Any]] = [
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1e-30},
        {"repetition_penalty": HUGE, "temperature": 2},
        {"temperature": 0.0, "top_p": 1, "top_k": -1, "min_p": 1},
        {"temperature": 1e-4, "top_k": HUGE, "top_p": 1e-9},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"min_tokens": 16, "max_tokens": 16},
        {"logprobs": 20, "prompt_logprobs": 20},
        {"logit_bias": {"319": HUGE, 0: -HUGE, 5: -1e300}},
        {"stop_token_ids": list(range(128)), "allowed_token_ids": list(range(VOCAB)), "stop": []},
        {"bad_words": ["x" * 16], "stop": ("a", "b")},
    ]
    outputs = engine.generate([[5]] * len(good), [SamplingParams(**{"max_tokens": 4, **fields}) for fields in good])
    assert [o.error for o in outputs] == [None] * len(good)
    assert all(0 <= t < VOCAB for o in outputs for t in o.outputs[0].token_ids)
    assert outputs[8].outputs[0].token_ids == (319,) * 4
