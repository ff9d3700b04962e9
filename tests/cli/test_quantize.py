"""`quire quantize`: with a fake quantizer what it is asked for and prints, and once for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.quantizing import LayerReport, QuantizationReport, Settings
from engine.runtime.progress import Report
from models.loading.load import load_model
from serving.cli import main
from tests.models.tiny_checkpoints import GOLDEN

Capture = pytest.CaptureFixture[str]
asked: list[tuple[EngineConfig, Path, Settings, str | None, bool]] = []


def fake(
    config: EngineConfig, out: Path, settings: Settings, text: str | None, evaluate: bool, progress: Report
) -> QuantizationReport:
    """Says what it was asked for."""
    asked.append((config, out, settings, text, evaluate))
    progress(1, 1, "layer 0")
    out.mkdir()
    layer = LayerReport(0, {"model.layers.0.mlp.up_proj": 0.125, "model.layers.0.mlp.down_proj": 0.25}, 0.5)
    return QuantizationReport((layer,), 64, 2_000_000, None)


def quantize(*args: str) -> int:
    asked.clear()
    return main(["quantize", "--no-show-progress", *args], quantizer=fake)


def test_what_is_asked_and_printed(tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "c.jsonl"
    text.write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n')
    options = ["--method", "autoround", "--bits", "3", "--asym", "--group-size", "-1", "--steps", "9", "--seed", "4"]
    assert quantize("m", "-o", str(tmp_path / "out"), "--calibration", str(text), *options, "--no-evaluation") == 0
    ((config, out, settings, calibration, evaluate),) = asked
    assert (config.load.model, out, calibration, evaluate) == ("m", tmp_path / "out", "one\n\ntwo", False)
    assert settings == Settings(method="autoround", bits=3, sym=False, group_size=-1, steps=9, seed=4)
    shown = capsys.readouterr().out
    assert "up_proj  down_proj  all so far" in shown and "12.50      25.00       50.00" in shown
    assert "2.0 MB" in shown and (tmp_path / "out" / "quantization_errors.png").is_file()
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["layers"][0]["block"] == 0.5


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 1: not JSON"), ('{"txt": "a"}', 'line 1: must be an object with a string "text"')]
)
def test_bad_calibration_files(line: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "c.jsonl").write_text(line)
    assert quantize("m", "-o", str(tmp_path / "out"), "--calibration", str(tmp_path / "c.jsonl")) != 0
    assert message in capsys.readouterr().err


def test_settings_that_contradict_each_other(tmp_path: Path, capsys: Capture) -> None:
    assert quantize("m", "-o", str(tmp_path / "out"), "--format", "awq", "--bits", "8") != 0
    assert "format awq has 4 bits" in capsys.readouterr().err
    assert quantize("m", "-o", str(tmp_path / "no" / "out")) != 0
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.slow
def test_for_real(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    text = tmp_path / "c.txt"
    text.write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 8)
    options = ["--method", "rtn", "--bits", "8", "--group-size", "32", "--seq-len", "32", "--calibration", str(text)]
    assert main(["quantize", "--no-show-progress", str(GOLDEN / "llama"), "-o", str(out), *options]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "all so far" in shown
    assert load_model(out).quantization is not None and (out / "tokenizer.json").is_file()
