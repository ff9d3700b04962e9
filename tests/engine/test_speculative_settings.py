"""What is wrong with `speculative_config` is said at the start, in one error: what was given and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.errors import ConfigError, QuireError
from engine.speculative.settings import METHODS, parse_speculative
from tests.engine.helpers import SMALL, TINY
from tests.engine.speculation import HEADS, NUM_DRAFTS, TAPS, TARGET_RAW, random_head
from tests.models.tiny_checkpoints import write_checkpoint
from tests.models.tiny_heads import eagle3_random, eagle_random, eagle_raw

LLAMA = str(TINY / "llama")
VALID: dict[str, dict[str, Any]] = {
    "ngram": {},
    "suffix": {},
    "layer_skip": {"layers": [0, 1]},
    "draft_model": {"model": LLAMA},
    "medusa": {"model": "somewhere"},
    "eagle": {"model": "somewhere"},
    "eagle3": {"model": "somewhere"},
}


def config(method: str, **changes: Any) -> dict[str, Any]:
    """A valid `speculative_config` of a method, with changes; None takes a key out."""
    whole = {"method": method, "num_speculative_tokens": NUM_DRAFTS, **VALID[method], **changes}
    return {key: value for key, value in whole.items() if value is not None}


def test_every_method_is_known_here() -> None:
    """The tests below run over all of them; and what they change is valid."""
    assert set(VALID) == set(METHODS)
    for method in METHODS:
        assert parse_speculative(json.dumps(config(method))).method == method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_speculative_tokens": None}, "num_speculative_tokens is missing"),
        ({"num_speculative_tokens": 0}, "must be an integer from 1 to 32, got 0"),
        ({"num_speculative_tokens": 33}, "must be an integer from 1 to 32, got 33"),
        ({"num_speculative_tokens": -1}, "must be an integer from 1 to 32, got -1"),
        ({"num_speculative_tokens": 2.5}, "must be an integer from 1 to 32, got 2.5"),
        ({"num_speculative_tokens": True}, "must be an integer from 1 to 32, got True"),
        ({"num_speculative_tokens": "3"}, "must be an integer from 1 to 32, got '3'"),
        ({"adaptive": "yes"}, "adaptive must be true or false, got 'yes'"),
        ({"tree": 1}, "tree is not known; known are method"),
    ],
)
def test_bad_values_of_every_method(method: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_speculative(json.dumps(config(method, **changes)))
    assert says in str(caught.value) and str(caught.value).startswith("speculative_config: ")


FOREIGN = {
    "prompt_lookup_min": 2,
    "suffix_decoding_max_tree_depth": 8,
    "suffix_decoding_max_cached_requests": 0,
    "suffix_decoding_max_spec_factor": 1,
    "suffix_decoding_min_token_prob": 0.5,
    "layers": [0],
    "model": "somewhere",
    "quantization": "int8",
}


@pytest.mark.parametrize("method", METHODS)
def test_keys_of_other_methods_are_refused(method: str) -> None:
    """By name, whatever the method; its own are taken."""
    taken = []
    for key, value in FOREIGN.items():
        try:
            parse_speculative(json.dumps(config(method, **{key: value})))
            taken.append(key)
        except ConfigError as error:
            assert f"{key} is of method" in str(error)
    assert len(taken) == {"ngram": 1, "suffix": 4, "layer_skip": 2, "draft_model": 2}.get(method, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("@/no/such/file", "/no/such/file cannot be read"),
        ('{"num_speculative_tokens": 3}', "method is missing"),
        ('{"method": "oracle", "num_speculative_tokens": 3}', "method must be one of ngram, suffix"),
        ('{"method": ["ngram"], "num_speculative_tokens": 3}', "method must be one of ngram, suffix"),
        ('{"method": null, "num_speculative_tokens": 3}', "method must be one of ngram, suffix"),
        ('{"method": "mtp", "num_speculative_tokens": 3}', "no model family here has layers of multi-token prediction"),
    ],
)
def test_texts_that_are_no_settings(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_speculative(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ("ngram", {"prompt_lookup_min": 6}, "prompt_lookup_max must be an integer from 6 to 32, got 5"),
        ("ngram", {"prompt_lookup_min": 0}, "prompt_lookup_min must be an integer from 1 to 32, got 0"),
        (
            "suffix",
            {"suffix_decoding_min_token_prob": 2},
            "suffix_decoding_min_token_prob must be a number from 0 to 1",
        ),
        ("suffix", {"suffix_decoding_min_token_prob": float("nan")}, "must be a number from 0 to 1, got nan"),
        ("suffix", {"suffix_decoding_max_spec_factor": 0}, "must be a number from 0.5 to 32, got 0"),
        ("suffix", {"suffix_decoding_max_tree_depth": 1}, "must be an integer from 2 to 256, got 1"),
        ("suffix", {"suffix_decoding_max_cached_requests": -1}, "must be an integer from 0 to 1000000, got -1"),
        ("layer_skip", {"layers": None}, "layers or quantization is missing"),
        ("layer_skip", {"layers": 0}, "number of layers or a list"),
        ("layer_skip", {"layers": []}, "number of layers or a list"),
        ("layer_skip", {"layers": [1, 0]}, "ascending indices"),
        ("layer_skip", {"layers": [-1, 0]}, "ascending indices"),
        ("layer_skip", {"layers": "all"}, "number of layers or a list"),
        ("layer_skip", {"layers": {"0": 1}}, "number of layers or a list"),
        ("draft_model", {"model": None}, "model is missing"),
        ("draft_model", {"model": 7}, "model must be a text, got 7"),
        ("draft_model", {"quantization": 8}, "quantization must be a text, got 8"),
        ("medusa", {"model": None}, "model is missing"),
        ("eagle", {"model": None}, "model is missing"),
        ("eagle3", {"model": None}, "model is missing"),
    ],
)
def test_bad_values(method: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_speculative(json.dumps(config(method, **changes)))
    assert says in str(caught.value)


def refused(asked: dict[str, Any], **settings: Any) -> str:
    """What the start of an engine of the tiny model says."""
    with pytest.raises(QuireError) as caught:
        Engine(LLAMA, **{**SMALL, **settings}, speculative_config=asked)
    return str(caught.value)


def test_packed_weights_of_a_kind_that_there_is_not() -> None:
    asked = {"method": "layer_skip", "quantization": "int5", "num_speculative_tokens": 2}
    assert "speculative_config: quantization 'int5' is not known" in refused(asked)


def test_packed_weights_are_not_packed_again() -> None:
    asked = {"method": "layer_skip", "quantization": "int8_w8a8", "num_speculative_tokens": 2}
    assert "this model's are packed already" in refused(asked, quantization="int8")


@pytest.mark.parametrize("method", METHODS)
def test_too_many_drafts_for_a_step(method: str, tmp_path: Path) -> None:
    """Also where each is valid by itself."""
    if method in HEADS:
        raw, tensors = random_head(method)
        asked = config(method, model=str(write_checkpoint(tmp_path, raw, tensors)), num_speculative_tokens=8)
    else:
        asked = config(method, num_speculative_tokens=8)
    says = refused(asked, max_num_batched_tokens=8)
    assert "num_speculative_tokens=8 and a token of the sequence do not fit in max_num_batched_tokens=8" in says


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (99, "layers=99 must leave out at least one of the model's 3 layers"),
        ([0, 1, 2], "leave out at least one"),
        ([7], "name none beyond 2"),
    ],
)
def test_layers_that_the_model_has_not(layers: Any, says: str) -> None:
    assert says in refused(config("layer_skip", layers=layers))


@pytest.mark.parametrize("method", ["draft_model", *HEADS])
def test_models_that_are_not_there(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A name that nobody has, and a directory without files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no/such-model-here-at-all" in refused(config(method, model="no/such-model-here-at-all"))
    assert str(tmp_path) in refused(config(method, model=str(tmp_path)))


def test_a_draft_model_of_another_vocabulary(tmp_path: Path) -> None:
    """Both sizes are named."""
    (tmp_path / "config.json").write_text(json.dumps({**TARGET_RAW, "vocab_size": 64}))
    says = refused(config("draft_model", model=str(tmp_path)), load_format="dummy")
    assert f"the draft model has 64 tokens and the model {TARGET_RAW['vocab_size']}" in says


def test_a_draft_model_for_fewer_positions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TARGET_RAW, "max_position_embeddings": 64}))
    says = refused(config("draft_model", model=str(tmp_path)), load_format="dummy")
    assert "made for 64 positions, fewer than max_model_len=128" in says


def test_a_quantization_that_does_not_exist() -> None:
    assert "quantization must be" in refused(config("draft_model", quantization="int3"))


@pytest.mark.parametrize("method", HEADS)
def test_heads_of_another_model(method: str, tmp_path: Path) -> None:
    """Another vocabulary, another width: both sizes are named."""
    raw, tensors = random_head(method)
    vocab, size = TARGET_RAW["vocab_size"], TARGET_RAW["hidden_size"]
    for changes, given in (({"vocab_size": 44}, f"vocab_size is 44 .*{vocab}"), ({"hidden_size": 18}, f"18.*{size}")):
        write_checkpoint(tmp_path, raw | changes, tensors)
        with pytest.raises(QuireError, match=given):
            Engine(LLAMA, **SMALL, speculative_config=config(method, model=str(tmp_path)))


@pytest.mark.parametrize("method", HEADS)
def test_heads_of_another_method(method: str, tmp_path: Path) -> None:
    """Tensors are missing or not expected, and some are named."""
    other = {"medusa": "eagle", "eagle": "eagle3", "eagle3": "medusa"}[method]
    raw, tensors = random_head(other)
    for key in ("medusa_num_heads", "medusa_num_layers"):
        raw.setdefault(key, NUM_DRAFTS)
    path = write_checkpoint(
        tmp_path, {**eagle_raw(TARGET_RAW, num_attention_heads=2, head_dim=8), **TAPS, **raw}, tensors
    )
    says = refused(config(method, model=str(path)))
    assert "missing" in says or "unexpected" in says or "not expected" in says


def test_more_drafts_than_medusa_heads(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, *random_head("medusa"))
    says = refused(config("medusa", model=str(path), num_speculative_tokens=4))
    assert "num_speculative_tokens is 4, and" in says and "has 3 Medusa heads" in says


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_tensors_of_another_size(method: str, tmp_path: Path) -> None:
    """The config fits and the weights do not: both shapes are named."""
    raw = eagle_raw(TARGET_RAW, num_attention_heads=2, head_dim=8) | TAPS
    tensors = eagle_random(raw) if method == "eagle" else eagle3_random(raw, TARGET_RAW["hidden_size"])
    tensors["fc.weight"] = tensors["fc.weight"][:, 1:]
    path = write_checkpoint(tmp_path, raw, tensors)
    rows, columns = tensors["fc.weight"].shape
    says = refused(config(method, model=str(path)))
    assert f"fc.weight is [{rows}, {columns}], expected [{rows}, {columns + 1}]" in says
