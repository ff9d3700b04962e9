"""The command line of the comparison, short of measuring."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.compare import __main__ as cli
from benchmarks.compare.registry import DEFAULT
from benchmarks.compare.results import Results
from benchmarks.workloads.cpu_smollm2 import ALL, STREAMS
from tests.benchmarks.comparisons import example


def _plan(*arguments: str) -> cli.Plan:
    return cli.make_plan(cli._parser().parse_args(arguments))


def test_defaults_are_the_whole_measurement() -> None:
    plan = _plan()
    assert [peer.name for peer in plan.peers] == list(DEFAULT)
    assert plan.workloads == tuple(ALL.values()) and plan.num_repetitions == 3


def test_quire_comes_first_and_is_always_there() -> None:
    assert [peer.name for peer in _plan("--peers", "transformers").peers] == ["quire", "transformers"]
    names = [peer.name for peer in _plan("--peers", "transformers-continuous,quire,transformers").peers]
    assert names == ["quire", "transformers-continuous", "transformers"]


def test_quick_is_one_repetition_of_cut_workloads() -> None:
    plan = _plan("--quick", "--workload", "w1,w2,w4", "--reps", "5")
    assert plan.num_repetitions == 1
    assert [("CUT" in w.about) for w in plan.workloads] == [False, True, True]


def test_variants_can_be_left_out_but_not_all() -> None:
    def ways(*arguments: str) -> tuple[str, ...]:
        return _plan(*arguments).peers[1].variants_of("w2")

    assert ways() == ("batch-all", "batch-16-sorted")
    assert ways("--skip-variants", "batch-all") == ("batch-16-sorted",)
    assert ways("--skip-variants", "batch-all,batch-16-sorted") == ("batch-16-sorted",)


def test_streams_and_none_stand_for_workloads() -> None:
    assert [w.name for w in _plan("--workload", "w3,streams,s1").workloads] == ["w3", *STREAMS]
    assert _plan("--workload", "none").workloads == ()
    assert all("CUT" in w.about for w in _plan("--workload", "streams", "--quick").workloads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "nobody"), "unknown: nobody; known: quire"),
        (("--workload", "w1,w9"), "unknown: w9; known: w1, w2, w3, w4, s1"),
        (("--skip-variants", "batch-7"), "unknown: batch-7; known: batch-all"),
        (("--reps", "0"), "'0' is not a whole number of 1 or more"),
        (("--dtype", "int3"), "invalid choice"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _plan(*arguments)
    assert message in capsys.readouterr().err


def test_published_commands_hold_no_paths() -> None:
    shown = cli._published_command(["--reps", "3", "--out", "/a/b", "--env-transformers=/c/d", "--render", "e/f g"])
    assert shown == "python -m benchmarks.compare --reps 3 --out PATH --env-transformers=PATH --render PATH"


def test_an_interpreter_is_chosen_by_its_environment() -> None:
    args = cli._parser().parse_args(["--env-transformers", "python-x"])
    assert cli._chosen(args, "transformers") == "python-x" and cli._chosen(args, "") is None


def test_a_report_is_made_again_from_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(example().as_json()))
    monkeypatch.setattr(sys, "argv", ["compare", "--render", str(file), "--out", str(tmp_path / "again")])
    monkeypatch.setattr(cli, "has_matplotlib", lambda: False)
    assert cli.main() == 0
    assert (tmp_path / "again" / "report.md").read_text() in capsys.readouterr().out
    again = Results.from_json(json.loads((tmp_path / "again" / "results.json").read_text()))
    assert again == example()


def test_what_cannot_be_made_ready_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "--workload", "w3", "--out", str(tmp_path), "--env-transformers", "no/python"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert cli.main() == 1
    assert "error: --env-transformers: no/python is not a Python interpreter" in capsys.readouterr().err
