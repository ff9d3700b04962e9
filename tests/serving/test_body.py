"""The limit of nesting, against a plain recursion."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.http.body import MAX_DEPTH, is_too_deep, parse_json
from serving.http.errors import ApiError

VALUES = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(alphabet='ab[]{}"\\\n', max_size=12)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text('[]{}"\\', max_size=4), inner, max_size=3)
    ),
    max_leaves=40,
)


def depth(value: Any) -> int:
    """Levels of lists and objects."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(VALUES, st.integers(0, MAX_DEPTH + 10))
def test_depth_is_as_a_recursion_counts_it(value: Any, around: int) -> None:
    for number in range(around):
        value = [value, 1] if number % 2 else {"a": "[", "b": value}
    data = json.dumps(value).encode()
    assert is_too_deep(data) == (depth(value) > MAX_DEPTH)
    if not is_too_deep(data):
        assert parse_json(data) == value


@pytest.mark.parametrize(
    "data", [b"[" * 10**6, b"]" * 10**6, b"[]" * 10**6, b"[" * 10**6 + b"]" * 10**6, b'"[' * 10**6]
)
def test_hostile_bodies_are_refused_in_time(data: bytes) -> None:
    begun = time.process_time()
    with pytest.raises(ApiError) as refused:
        parse_json(data * (2_000_000 // len(data)))
    assert refused.value.status == 400
    assert time.process_time() - begun < 2


def test_large_batches_are_read_in_time() -> None:
    body = json.dumps({"prompt": [[7] * 1000] * 1024, "extra": ['a "text" with \\ [brackets] {x}'] * 1000}).encode()
    begun = time.process_time()
    assert not is_too_deep(body)
    assert time.process_time() - begun < 0.5
