"""`quire distill-draft` with a fake search: what is asked for, written and printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.distilling import DistillReport, DraftChoice, best_number_of_drafts
from engine.runtime.progress import Report
from engine.speculative.settings import parse_speculative
from serving.cli import main


def fake(config: EngineConfig, text: str | None, num_tokens: int, progress: Report) -> DistillReport:
    """Two choices, of which the second pays if the text says so."""
    progress(1, 1, "1 of 1 layers left out")
    gain = 1.3 if text == "good" else 0.9
    choices = (DraftChoice((0, 1, 3), 0.8, 0.75, 1, 0.8), DraftChoice((0, 3), 0.7, 0.5, 4, gain))
    return DistillReport(config.load.model, 4, num_tokens, choices)


def test_what_is_written_is_what_the_engine_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("good")
    out = tmp_path / "draft.json"
    args = ["distill-draft", "--no-show-progress", "m", "-o", str(out), "--text", str(tmp_path / "t.txt")]
    assert main([*args, "--tokens", "100"], distiller=fake) == 0
    settings = parse_speculative(f"@{out}")
    assert (settings.method, settings.layers, settings.num_speculative_tokens) == ("layer_skip", (0, 3), 4)
    shown = capsys.readouterr().out
    assert "4 layers, 100 tokens" in shown and "70.0 %" in shown and "1.30  <- written" in shown
    assert "No choice" not in shown and f"@{out}" in shown


def test_a_model_that_gains_nothing_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill-draft", "--no-show-progress", "m", "-o", str(tmp_path / "d.json")], distiller=fake) == 0
    assert "No choice is predicted to pay" in capsys.readouterr().out
    json_args = ["distill-draft", "--no-show-progress", "m", "--json", "-o", str(tmp_path / "d.json")]
    assert main(json_args, distiller=fake) == 0
    assert json.loads(capsys.readouterr().out)["choices"][1]["layers"] == [0, 3]


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "missing" / "d.json"
    assert main(["distill-draft", "--no-show-progress", "m", "-o", str(out)], distiller=fake) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(("agreement", "cost", "drafts", "speedup"), [(0.9, 0.1, 8, 3.40), (0.5, 0.9, 1, 0.79)])
def test_the_number_of_drafts(agreement: float, cost: float, drafts: int, speedup: float) -> None:
    """By hand: (1 - a^(k+1)) / (1 - a) / (1 + k c) at k = 8 is 6.126 / 1.8, at k = 1 1.5 / 1.9."""
    count, gain = best_number_of_drafts(agreement, cost)
    assert count == drafts and gain == pytest.approx(speedup, abs=0.005)
