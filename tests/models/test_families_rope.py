"""Both dialects of rotary embeddings."""

import logging
from typing import Any

import pytest

from models.config import RopeConfig
from models.errors import UnsupportedModelError
from models.families.rope import parse_rope

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def parse(raw: dict[str, Any]) -> RopeConfig:
    return parse_rope(raw, head_dim=64, max_position=32768, default_theta=10000.0)


def both(kind: str, **parameters: Any) -> list[dict[str, Any]]:
    """The same embedding in every spelling."""
    return [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": kind, **parameters}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **parameters}},
        {"rope_theta": 5e5, "rope_scaling": {"type": kind, **parameters}},
        {"rope_theta": 5e5, "rope_scaling": {"type": kind, "rope_type": kind, **parameters}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": kind, **parameters}},
        {"rope_scaling": {"rope_theta": 5e5, "rope_type": kind, **parameters}},
        {
            "rope_parameters": {"rope_theta": 5e5, "rope_type": kind, **parameters},
            "rope_theta": 10000.0,  # a leftover of another version; the newer dialect wins, as in transformers
            "rope_scaling": None,
        },
    ]


@pytest.mark.parametrize("raw", both("default") + [{"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}])
def test_default(raw: dict) -> None:
    assert parse(raw) == RopeConfig(theta=5e5, rotary_dim=64)


@pytest.mark.parametrize("raw", both("linear", factor=4))
def test_linear(raw: dict) -> None:
    assert parse(raw) == RopeConfig(theta=5e5, rotary_dim=64, scaling="linear", factor=4.0)


@pytest.mark.parametrize("raw", both("llama3", **LLAMA3))
def test_llama3(raw: dict) -> None:
    assert parse(raw) == RopeConfig(
        theta=5e5,
        rotary_dim=64,
        scaling="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )


@pytest.mark.parametrize("raw", both("yarn", factor=4.0, original_max_position_embeddings=8192))
def test_yarn_with_its_defaults(raw: dict) -> None:
    assert parse(raw) == RopeConfig(
        theta=5e5, rotary_dim=64, scaling="yarn", factor=4.0, original_max_position=8192, beta_fast=32.0, beta_slow=1.0
    )


def test_yarn_with_everything() -> None:
    parameters = {
        "factor": 40,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "attention_factor": 1.5,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
    for raw in both("yarn", **parameters):
        assert parse(raw) == RopeConfig(
            theta=5e5,
            rotary_dim=64,
            scaling="yarn",
            factor=40.0,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=0.7,
            mscale_all_dim=1.0,
            attention_factor=1.5,
            truncate=False,
            original_max_position=4096,
        )


def test_yarn_fallbacks() -> None:
    def yarn(beside: dict | None = None, **parameters: Any) -> RopeConfig:
        return parse({"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", **parameters}} | (beside or {}))

    assert yarn(factor=4.0).original_max_position == 32768
    assert yarn(factor=None, original_max_position_embeddings=8192).factor == 4.0
    outside = yarn({"original_max_position_embeddings": 4096}, factor=4.0, original_max_position_embeddings=8192)
    assert outside.original_max_position == 4096
    zeros = yarn(factor=4.0, beta_fast=0, beta_slow=0, mscale=0, mscale_all_dim=0)
    assert (zeros.beta_fast, zeros.beta_slow, zeros.mscale, zeros.mscale_all_dim) == (32.0, 1.0, None, None)


def test_llama3_falls_back_to_the_models_length() -> None:
    without = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    raw = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **without}}
    assert parse(raw).original_max_position == 32768


def test_partial_rotary_factor() -> None:
    assert parse({"rope_theta": 5e5, "partial_rotary_factor": 0.5}).rotary_dim == 32
    assert parse({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.25}}).rotary_dim == 16
    for factor in (1.5, 0.01, 3 / 64):
        with pytest.raises(UnsupportedModelError, match="partial_rotary_factor"):
            parse({"rope_theta": 5e5, "partial_rotary_factor": factor})


def test_theta_is_never_guessed_beside_a_new_dialect() -> None:
    with pytest.raises(UnsupportedModelError, match="rope_parameters has no rope_theta"):
        parse({"rope_parameters": {"rope_type": "linear", "factor": 2.0}})


@pytest.mark.parametrize("raw", [{}, {"rope_scaling": {"type": "linear", "factor": 2.0}}])
def test_theta_of_the_family_is_taken_aloud(raw: dict, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert parse(raw).theta == 10000.0
    assert "default of 10000 applies" in caplog.text


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", "ntk"])
def test_other_kinds_are_refused_by_name(kind: str) -> None:
    for raw in both(kind, factor=2.0):
        with pytest.raises(UnsupportedModelError, match=f"'{kind}' is not supported; supported are default, linear"):
            parse(raw)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": -2.0}, "factor is -2.0"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor is missing"),
        ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor is 1.0; it must be above"),
        ({"rope_type": "yarn", "factor": "4"}, "factor is '4'"),
        ({"rope_type": 4}, "rope_type is 4"),
        ({"full_attention": {"rope_type": "default"}}, "differs by layer type"),
    ],
)
def test_refusals(parameters: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        parse({"rope_parameters": {"rope_theta": 5e5, **parameters}})


def test_contradicting_dialects_are_refused() -> None:
    raw = {
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    with pytest.raises(UnsupportedModelError, match="contradict each other: factor is 2.0 and 4.0"):
        parse(raw)
