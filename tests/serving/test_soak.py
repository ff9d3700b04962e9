"""Twenty minutes of everything at once, with clients that leave: nothing is lost, nothing leaks, nothing compiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak.__main__ import main

MINUTES = 20


@pytest.mark.slow
def test_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--minutes", str(MINUTES), "--out", str(tmp_path)])
    assert code == 0, capsys.readouterr().out
