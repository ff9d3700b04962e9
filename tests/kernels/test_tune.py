"""The tuner's decisions, with a made-up op and a made-up clock."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tune as tuner
from pallas_kernels.device import H200
from pallas_kernels.op import GpuCase, Op
from pallas_kernels.tune import (
    Candidate,
    TuningError,
    best_entry,
    microseconds,
    operand_sets,
    relative_error,
    time_case,
    tune,
    write_entries,
)
from pallas_kernels.tuning import choose_config, tuned_entries


@dataclasses.dataclass(frozen=True)
class Config:
    """Of the made-up kernel: `us` is what the made-up clock will say, `fault` what is wrong with it."""

    us: float
    fault: str = ""


BASELINE_US = 8.0


def kernel(name: str, config: Config | None) -> Callable[..., jax.Array]:
    def call(x: jax.Array) -> jax.Array:
        if config is not None and config.fault == "does not compile":
            raise ValueError("no swizzle\nand more")
        off = 1.0 if config is not None and config.fault == "wrong" else 0.0
        return 2 * x + off

    call.us = BASELINE_US if config is None else config.us  # type: ignore[attr-defined]
    return call


def make_case(name: str, configs: Sequence[Config], key: str = "k") -> GpuCase:
    return GpuCase(
        name=name,
        key=key,
        arguments=(jax.ShapeDtypeStruct((64,), jnp.float32),),
        function=kernel,
        sample=lambda seed: (np.random.default_rng(seed).standard_normal(64).astype(np.float32),),
        configs=tuple(configs),
        instructions=("HGMMA",),
        num_bytes=512,
        num_flops=64,
    )


def clock(function: Any, sets: Sequence[tuple[Any, ...]], num_calls: int) -> float:
    """Quick passes are 1 us off for the configuration of 5 us."""
    return function.us + (2.0 if num_calls == tuner.QUICK_CALLS and function.us == 5 else 0.0)


def test_candidates_are_checked_then_timed_and_the_best_again() -> None:
    configs = [Config(7), Config(6), Config(5), Config(1, "wrong"), Config(1, "does not compile")]
    found = time_case(make_case("c", configs), 3, clock)
    assert [(c.config, c.us) for c in found[:4]] == [(configs[2], 5), (configs[1], 6), (configs[0], 7), (None, 8)]
    assert "differs from xla by" in found[4].reason and found[4].us is None
    assert found[5].reason == "ValueError: no swizzle"


def test_only_the_top_is_timed_thoroughly() -> None:
    found = time_case(make_case("c", [Config(6), Config(5), Config(9)]), 1, clock)
    assert [(c.config, c.us) for c in found] == [(Config(6), 6), (None, 8), (Config(5), 7), (Config(9), 9)]


def test_the_best_over_all_cases_of_a_key() -> None:
    a, b, c = Config(1), Config(2), Config(3)
    first = [Candidate(a, 1.0), Candidate(b, 3.0), Candidate(None, 4.0)]
    second = [Candidate(a, 9.0), Candidate(b, 3.0), Candidate(None, 6.0), Candidate(c, None, "spills")]
    assert best_entry([first, second]) == {"config": {"us": 2, "fault": ""}, "us": 3.0, "xla_us": 5.0}
    assert best_entry([first, [Candidate(None, 4.0)]]) is None


def test_what_is_written_is_what_kernels_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = Op("made_up", (), ())
    path = tmp_path / "pallas_kernels" / "tuned" / H200.slug / "made_up.json"
    write_entries(path, H200, {"old": {"config": {"us": 1, "fault": ""}, "us": 1.0}})
    monkeypatch.setattr(tuner, "time_case", lambda case, top: [Candidate(config, config.us) for config in case.configs])
    tune(op, [make_case("a", [Config(3), Config(2)]), make_case("b", [Config(4)], "other")], H200, 2, path)
    table = json.loads(path.read_text())
    assert table["device"] == "NVIDIA H200" and table["jax"] == jax.__version__
    assert set(table["entries"]) == {"k", "old", "other"}
    monkeypatch.setattr("pallas_kernels.tuning.resources.files", lambda package: tmp_path / package)
    tuned_entries.cache_clear()
    assert choose_config("made_up", "k", Config, H200, None, lambda: Config(99)) == Config(2)
    tuned_entries.cache_clear()


def test_errors_are_relative_to_the_numbers_size() -> None:
    assert relative_error(np.full(4, 101.0), np.full(4, 100.0)) == pytest.approx(0.01)
    assert relative_error(np.array([np.nan]), np.ones(1)) == np.inf
    assert relative_error((np.ones(2), np.zeros(2)), (np.ones(2), np.zeros(2))) == 0


def test_operands_take_turns_and_are_never_alike() -> None:
    sets = operand_sets(make_case("c", []))
    assert len(sets) == tuner.MOST_SETS
    assert len({float(operands[0][0]) for operands in sets}) == len(sets)


def test_the_clock_runs_every_set() -> None:
    sets = [(jnp.full(1000, float(i)),) for i in range(3)]
    assert 0 < microseconds(lambda x: jnp.sin(x), sets, 6) < 1e6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing", "--device", "h200"], "there is no op 'nothing'; there are: made_up, no_kernel"),
        (["no_kernel", "--device", "H200"], "no_kernel has no GPU kernel"),
        (["made_up", "--device", "h200", "--case", "x"], "no case of made_up contains 'x'; there are: c"),
        (["made_up", "--device", "h200"], "times kernels on it, and this machine has cpu; --dry-run"),
    ],
)
def test_what_cannot_be_done_is_one_error(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ops = (Op("made_up", (), (), lambda: (make_case("c", []),)), Op("no_kernel", (), ()))
    monkeypatch.setattr(tuner, "OPS", ops)
    assert tuner.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_a_dry_run_without_the_packages_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuner, "OPS", (Op("made_up", (), (), lambda: (make_case("c", []),)),))
    monkeypatch.setattr("pallas_kernels.aot.launch._PACKAGES", {"not_there": ("some-package",)})
    assert tuner.main(["made_up", "--device", "h200", "--dry-run"]) == 2
    assert "needs some-package" in capsys.readouterr().err


def test_select_keeps_the_cases_that_contain_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (make_case("decode a", []), make_case("prefill a", []))
    monkeypatch.setattr(tuner, "OPS", (Op("made_up", (), (), lambda: cases),))
    assert tuner.select("made_up", "decode")[1] == [cases[0]]
    with pytest.raises(TuningError):
        tuner.select("made_up", "verify")
