"""`quire eval` with a fake meter: what it is asked for, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.evaluation import Comparison, Evaluated, EvaluationReport
from engine.runtime.progress import Report
from serving.cli import main

Capture = pytest.CaptureFixture[str]
asked: list[tuple[EngineConfig, EngineConfig | None, str | None, int]] = []


def fake(
    config: EngineConfig, reference: EngineConfig | None, text: str | None, window: int, progress: Report
) -> EvaluationReport:
    """Says what it was asked for."""
    asked.append((config, reference, text, window))
    progress(1, 1, "window 1 of 1")
    model = Evaluated(config.load.model, config.load.quantization, config.load.dtype, 12.5)
    if reference is None:
        return EvaluationReport(model, 100, 2, window)
    base = Evaluated(reference.load.model, reference.load.quantization, reference.load.dtype, 10.0)
    return EvaluationReport(model, 100, 2, window, Comparison(base, 0.25, 0.01, 0.0625, 0.875))


def evaluate(*args: str) -> int:
    asked.clear()
    return main(["eval", "--no-show-progress", *args], evaluator=fake)


def test_a_table(capsys: Capture) -> None:
    assert evaluate("m", "--quantization", "int8", "--dtype", "float32", "--matmul-implementation", "xla") == 0
    ((config, reference, text, window),) = asked
    assert reference is not None and reference.load.quantization is None and reference.load.model == "m"
    assert reference.load.dtype == config.load.dtype == "float32" and config.load.quantization == "int8"
    assert reference.kernels.matmul_implementation == "auto" and config.kernels.matmul_implementation == "xla"
    assert text is None and window == 512
    shown = capsys.readouterr().out
    assert "m, unquantized, float32" in shown and "12.500" in shown and "+25.00 % ± 1.00" in shown
    assert "0.06250" in shown and "87.5 %" in shown


def test_json_of_one_model(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("grün")
    assert evaluate("m", "--json", "--text", str(tmp_path / "t.txt"), "--window", "64") == 0
    assert asked[0][1:] == (None, "grün", 64)
    shown = json.loads(capsys.readouterr().out)
    assert shown["model"]["perplexity"] == 12.5 and shown["comparison"] is None and shown["window"] == 64


def test_a_named_reference_takes_nothing_of_the_model(capsys: Capture) -> None:
    assert evaluate("m", "--reference", "r", "--quantization", "int8", "--dtype", "bfloat16") == 0
    reference = asked[0][1]
    assert reference is not None and reference.load.model == "r"
    assert reference.load.quantization is None and reference.load.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("m", "--text", "/nowhere/t.txt"), "--text /nowhere/t.txt cannot be read: No such file"),
        (("m", "--quantization", "int9"), None),
    ],
)
def test_refused(args: tuple[str, ...], message: str | None, capsys: Capture) -> None:
    try:
        code = evaluate(*args)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and not asked
    assert message is None or message in capsys.readouterr().err


def test_a_text_that_is_not_utf8(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "t").write_bytes(b"\xff\xfe")
    assert evaluate("m", "--text", str(tmp_path / "t")) == 2
    assert "is not UTF-8" in capsys.readouterr().err
