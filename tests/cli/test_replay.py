"""`quire replay`: what it hands on, what it prints, how it ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.replay.report import Difference, ReplayReport
from serving.cli import main

SAME = ReplayReport("run.jsonl", "cpu:cpu", "cpu:cpu", 12, 34, 0.5, None)
OTHER = ReplayReport(
    "run.jsonl", "gpu:NVIDIA H200", "cpu:cpu", 3, 9, 0.5, Difference(7, "tokens", "r1[0], position 20", "[5]", "[6]")
)


def test_equal_steps_end_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[Path, dict[str, Any]]] = []

    def play(path: Path, changes: Mapping[str, Any]) -> ReplayReport:
        seen.append((path, dict(changes)))
        return SAME

    assert main(["replay", "run.jsonl", "--matmul-implementation", "xla", "--no-show-progress"], player=play) == 0
    assert seen == [(Path("run.jsonl"), {"matmul_implementation": "xla", "show_progress": False})]
    out = capsys.readouterr().out
    assert "12 steps, 34 tokens, 0.50 s on cpu:cpu\n" in out and "bit for bit" in out


def test_a_difference_is_printed_and_ends_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "run.jsonl"], player=lambda path, changes: OTHER) == 1
    out = capsys.readouterr().out
    assert "recorded on gpu:NVIDIA H200" in out
    assert "first difference in step 7: tokens of r1[0], position 20\n  now:  [5]\n  then: [6]" in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "run.jsonl", "--json"], player=lambda path, changes: OTHER) == 1
    assert json.loads(capsys.readouterr().out)["difference"]["step"] == 7


def test_what_shapes_steps_cannot_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["replay", "run.jsonl", "--max-num-seqs", "4"], player=lambda path, changes: SAME)
    assert "--max-num-seqs" in capsys.readouterr().err
