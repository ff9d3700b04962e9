"""`quire convert` with a fake converter: where it may write, and that nothing half-made stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import ModelNotFoundError
from engine.runtime.progress import Report
from serving.cli import main

Capture = pytest.CaptureFixture[str]


def converter(config: EngineConfig, out: Path, progress: Report) -> None:
    """Writes what a conversion looks like from outside."""
    assert not out.exists() and out.parent.is_dir()
    progress(0, 1, "weights")
    (out / "weights").mkdir(parents=True)
    (out / "weights" / "_CHECKPOINT_METADATA").write_text("{}")
    (out / "model").write_text(f"{config.load.model} {config.load.dtype}")
    progress(1, 1, "weights")


def fails_midway(config: EngineConfig, out: Path, progress: Report) -> None:
    out.mkdir()
    raise OSError(28, "No space left on device")


def finds_no_model(config: EngineConfig, out: Path, progress: Report) -> None:
    raise ModelNotFoundError("There is no model 'm'.")


def convert(*args: str, by=converter) -> int:
    return main(["convert", "--no-show-progress", *args], converter=by)


def test_convert_writes_a_folder_with_the_settings(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "deep" / "out"
    assert convert("m", "-o", str(out), "--dtype", "bfloat16") == 0
    assert (out / "model").read_text() == "m bfloat16"
    assert capsys.readouterr().out == f"{out}: 0.0 MB\n"
    assert [path.name for path in out.parent.iterdir()] == ["out"], "no scratch folder stays"


def test_an_empty_folder_may_be_written(tmp_path: Path) -> None:
    assert convert("m", "-o", str(tmp_path)) == 0
    assert (tmp_path / "model").exists()


def test_an_earlier_conversion_needs_force(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert convert("m", "-o", str(out)) == 0
    assert convert("m2", "-o", str(out)) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert (out / "model").read_text() == "m auto"
    assert convert("m2", "-o", str(out), "--force") == 0
    assert (out / "model").read_text() == "m2 auto"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_never_replaces_anything_else(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.png").write_text("miau")
    file = tmp_path / "file"
    file.write_text("text")
    for place in (folder, file):
        assert convert("m", "-o", str(place), "--force") == 2
        assert "is not an earlier conversion" in capsys.readouterr().err
    assert (folder / "cat.png").read_text() == "miau" and file.read_text() == "text"


def test_a_failure_leaves_what_was_there(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert convert("m", "-o", str(out), by=fails_midway) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

    assert convert("m", "-o", str(out)) == 0
    assert convert("m2", "-o", str(out), "--force", by=fails_midway) == 2
    assert (out / "model").read_text() == "m auto"


def test_the_engines_own_errors_stay_as_they_are(tmp_path: Path, capsys: Capture) -> None:
    assert convert("m", "-o", str(tmp_path / "out"), by=finds_no_model) == 2
    assert capsys.readouterr().err == "quire: error: There is no model 'm'.\n"


def test_flags_that_a_conversion_does_not_use_are_refused(tmp_path: Path, capsys: Capture) -> None:
    for flag in ("--block-size", "--max-num-seqs", "--max-model-len"):
        with pytest.raises(SystemExit):
            convert("m", "-o", str(tmp_path / "out"), flag, "32")
