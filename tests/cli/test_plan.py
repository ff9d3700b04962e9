"""`quire plan` with a fake planner: what it is asked for, and what is printed."""

from __future__ import annotations

import dataclasses
import json

import pytest

from engine.config import EngineConfig
from engine.planning.report import CapacityPlan, Concurrency, DecodeFloor, PrefillFloor, WorkSpace
from engine.runtime.progress import Report
from serving.cli import main

Capture = pytest.CaptureFixture[str]
SPACE = WorkSpace(8192, 256, 300 << 20, "estimated")
PLAN = CapacityPlan(
    "m", "h200", "NVIDIA H200 SXM", "a datasheet", "llama", 2, 3_000_000, "bfloat16", "fp8", "int8", 4096, 256, 8192,
    16, 100 << 30, 5 << 30, 1 << 20, 32 << 10, SPACE, (WorkSpace(1, 1, 1 << 20, "estimated"), SPACE), 1000, 4096,
    (Concurrency(4096, 3, 3),), (DecodeFloor(4, 4096, 0.002, "weights", False),), (PrefillFloor(4096, 0.05),),
    ("A note.",),
)  # fmt: skip
asked: list[tuple[EngineConfig, str, int | None, list[int] | None]] = []


def fake(config: EngineConfig, device: str, memory: int | None, lengths: list[int] | None, _: Report) -> CapacityPlan:
    """Says what it was asked for."""
    asked.append((config, device, memory, lengths))
    return PLAN


def plan(*args: str) -> int:
    asked.clear()
    return main(["plan", "--no-show-progress", *args], planner=fake)


def test_tables(capsys: Capture) -> None:
    flags = ("--device", "h200", "--memory", "1.5", "--lengths", "100,200", "--quantization", "fp8")
    assert plan("m", *flags) == 0
    ((config, device, memory, lengths),) = asked
    assert (config.load.model, config.load.quantization) == ("m", "fp8")
    assert (device, memory, lengths) == ("h200", 3 << 29, [100, 200])
    shown = capsys.readouterr().out
    for part in ("5,120.0  exact", "1000 blocks of 32.0 KiB", "does not fit", "2,000", "A note.", "a datasheet"):
        assert part in shown, part


def test_json(capsys: Capture) -> None:
    assert plan("m", "--json") == 0
    assert asked[0][1:] == ("cpu", None, None)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(dataclasses.asdict(PLAN)))


def test_a_device_that_is_not_known(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        plan("m", "--device", "tpu")
    assert "h200" in capsys.readouterr().err
