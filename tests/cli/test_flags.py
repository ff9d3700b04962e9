"""Flags are made from dataclasses, so none can be forgotten and each type parses as it should."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections import Counter
from dataclasses import dataclass, field

import pytest

from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.structured.params import StructuredOutputsParams
from serving import flags


def parser_with_all_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    flags.add_engine_flags(parser)
    flags.add_sampling_flags(parser, skip=("output_kind",))
    return parser


def parse(*args: str) -> argparse.Namespace:
    return parser_with_all_flags().parse_args(args)


def test_every_field_of_every_dataclass_has_a_flag() -> None:
    options = parser_with_all_flags().format_help()
    for kind in typing.get_type_hints(EngineConfig).values():
        for f in dataclasses.fields(kind):
            assert f"--{f.name.replace('_', '-')}" in options
    for name in SamplingParams.field_names():
        if name != "output_kind":
            assert f"--{flags.SAMPLING_RENAMES.get(name, name.replace('_', '-'))}" in options


def test_each_sampling_parameter_has_a_help_text_and_nothing_else_has() -> None:
    assert set(flags.SAMPLING_HELP) == set(SamplingParams.field_names())


def test_the_parts_of_the_configuration_share_no_name() -> None:
    parts = typing.get_type_hints(EngineConfig).values()
    names = Counter(f.name for kind in parts for f in dataclasses.fields(kind))
    assert [name for name, times in names.items() if times > 1] == []


def test_flags_that_were_not_given_leave_the_defaults_alone() -> None:
    args = parse()
    assert flags.engine_settings(args) == {} and flags.sampling_settings(args) == {}


def test_the_engine_and_the_request_each_have_their_seed() -> None:
    args = parse("--seed", "1", "--request-seed", "2")
    assert flags.engine_settings(args) == {"seed": 1}
    assert flags.sampling_settings(args) == {"seed": 2}


def test_each_type_parses() -> None:
    args = parse(
        *["--max-model-len", "none", "--max-num-seqs", "8", "--gpu-memory-utilization", "0.5", "--dtype", "float32"],
        *["--no-enable-prefix-caching", "--compilation-cache-dir", ""],
    )
    assert flags.engine_settings(args) == {
        "max_model_len": None,
        "max_num_seqs": 8,
        "gpu_memory_utilization": 0.5,
        "dtype": "float32",
        "enable_prefix_caching": False,
        "compilation_cache_dir": "",
    }
    assert EngineConfig.from_flat(**flags.engine_settings(args)).scheduler.max_num_seqs == 8


@pytest.mark.parametrize(
    "args",
    [
        ["--block-size", "many"],
        ["--block-size", "none"],
        ["--gpu-memory-utilization", "half"],
        ["--dtype", "float8"],
        ["--stop-token-ids", "1,x"],
        ["--logit-bias", "{"],
        ["--logit-bias", "[1]"],
        ["--structured-outputs", "[0-9]+"],
        ["--structured-outputs", '["a"]'],
        ["--structured-outputs", '{"regexp": "a"}'],
        ["--structured-outputs", '{"regex": "a", "choice": ["b"]}'],
        ["--structured-outputs", "[" * 100_000],
    ],
)
def test_what_cannot_be_parsed_is_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*args)
    assert stopped.value.code == 2
    assert f"argument {args[0]}:" in capsys.readouterr().err


def test_structured_outputs_are_one_json_object() -> None:
    args = parse("--structured-outputs", '{"json": {"type": "integer"}, "disable_any_whitespace": true}')
    expected = StructuredOutputsParams(json={"type": "integer"}, disable_any_whitespace=True)
    assert SamplingParams(**flags.sampling_settings(args)).structured_outputs == expected


def test_defaults_and_percent_signs_show_in_the_help() -> None:
    @dataclass(frozen=True)
    class Part:
        """A part."""

        share: int = field(default=92, metadata={"help": "how many % of it"})

    parser = argparse.ArgumentParser()
    flags._add_fields(parser, "x", Part, (), helps={}, renames={})
    assert "how many % of it (default: 92)" in " ".join(parser.format_help().split())


def test_a_field_without_help_or_with_a_strange_type_is_the_developers_fault() -> None:
    @dataclass(frozen=True)
    class Silent:
        x: int = 1

    @dataclass(frozen=True)
    class Strange:
        x: complex = field(default=1j, metadata={"help": "a number"})

    with pytest.raises(TypeError, match="Silent.x has no help text"):
        flags._add_fields(argparse.ArgumentParser(), "x", Silent, (), helps={}, renames={})
    with pytest.raises(TypeError, match="No flag can be made"):
        flags._add_fields(argparse.ArgumentParser(), "x", Strange, (), helps={}, renames={})
