"""Architectures → families."""

import pytest

from models.errors import UnsupportedModelError
from models.loading.gguf_config import ARCHITECTURES
from models.registry import (
    FAMILIES,
    resolve_family,
    resolve_gguf_family,
    supported_architectures,
    supported_gguf_architectures,
)


def test_every_architecture_finds_its_family() -> None:
    for family in FAMILIES:
        for name in family.architectures:
            assert resolve_family([name]) is family
        for name in family.gguf_architectures:
            assert resolve_gguf_family(name) is family
    assert resolve_family(["SomethingElse", "Qwen3ForCausalLM"]).name == "qwen3"


def test_no_two_families_claim_the_same_name() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    gguf = [name for family in FAMILIES for name in family.gguf_architectures]
    assert sorted(names) == sorted(supported_architectures())
    assert sorted(gguf) == sorted(supported_gguf_architectures())


def test_gguf_reader_and_families_agree() -> None:
    assert set(ARCHITECTURES) == set(supported_gguf_architectures())
    for name, architecture in ARCHITECTURES.items():
        assert resolve_gguf_family(name) is resolve_family([architecture.hf_class])


def test_unknown_architectures_are_refused_with_the_list() -> None:
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel is not supported; supported are LlamaForCausalLM"):
        resolve_family(["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedModelError, match="no architecture is named; supported are"):
        resolve_family([])
    with pytest.raises(UnsupportedModelError, match="GGUF architecture 'gemma' is not supported; supported are llama"):
        resolve_gguf_family("gemma")
