"""`quire compile` and `quire bench startup` with fakes: places, settings, medians, and starts that contradict."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.runtime.progress import Report
from serving.bench import startup
from serving.cli import main
from serving.errors import MeasurementError

Capture = pytest.CaptureFixture[str]


def compiler(config: EngineConfig, out: Path, progress: Report) -> None:
    out.mkdir()
    (out / "bundle.json").write_text(f"{config.load.model} {config.cache.block_size}")


def compile_bundle(*args: str) -> int:
    return main(["compile", "--no-show-progress", *args], compiler=compiler)


def test_compile_writes_a_bundle_and_replaces_only_bundles(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert compile_bundle("m", "-o", str(out), "--block-size", "32") == 0
    assert (out / "bundle.json").read_text() == "m 32"
    assert compile_bundle("m2", "-o", str(out)) == 2
    assert "holds an earlier bundle; --force replaces it" in capsys.readouterr().err
    assert compile_bundle("m2", "-o", str(out), "--force") == 0
    assert (out / "bundle.json").read_text() == "m2 16"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("x")
    assert compile_bundle("m", "-o", str(tmp_path / "mine"), "--force") == 2
    assert (tmp_path / "mine" / "thesis").exists()


class Children:
    """Starts that take as long as they are told to."""

    def __init__(self, seconds: list[float], tokens: list[int] | None = None) -> None:
        self.seconds, self.tokens = seconds, tokens or [7] * len(seconds)
        self.asked: list[tuple[Mapping[str, Any], Path | None]] = []

    def __call__(self, settings: Mapping[str, Any], cache: Path | None) -> dict[str, Any]:
        at = len(self.asked)
        self.asked.append((settings, cache))
        assert cache is None or cache.is_dir()
        seconds = self.seconds[at]
        stages = {"load": seconds / 2, "first token": seconds / 2}
        return {"stages": stages, "first_token_s": seconds, "process_s": seconds + 1, "token_ids": [self.tokens[at]]}


def bench(children: Children, *args: str) -> int:
    parser = ArgumentParser()
    startup.set_up(parser)
    return startup.run(parser.parse_args(args), children)


def test_each_start_has_its_caches_and_the_medians_are_shown(tmp_path: Path, capsys: Capture) -> None:
    children, out = Children([9, 5, 7, 2, 1, 3]), tmp_path / "r.json"
    assert bench(children, "demo", "--runs", "3", "--json", str(out), "--block-size", "32") == 0
    cold, warm = children.asked[:3], children.asked[3:]
    assert len({cache for _, cache in cold}) == 3 and not any(cache.exists() for _, cache in cold if cache)
    assert all(settings["download_dir"] and settings["compilation_cache_dir"] for settings, _ in cold)
    assert all(cache is None and "download_dir" not in settings for settings, cache in warm)
    assert all(s["block_size"] == 32 and s["compile_in_background"] for s, _ in children.asked)
    result = json.loads(out.read_text())
    assert result["medians"]["cold"]["first_token_s"] == 7 and result["medians"]["warm"]["process_s"] == 3
    shown = capsys.readouterr().out
    assert "7.00 s    2.00 s" in shown and "to the first token" in shown


def test_starts_that_answer_differently_are_no_measurement() -> None:
    with pytest.raises(MeasurementError, match="different first tokens"):
        bench(Children([1, 1], [7, 8]), "m", "--runs", "2", "--caches", "warm")


@pytest.mark.slow
def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"No model .*nothing"):
        startup.run_child({"model": str(tmp_path / "nothing"), "show_progress": False}, None)
