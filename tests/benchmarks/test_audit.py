"""Foreign CPU time, from a made-up /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.compare import audit
from benchmarks.compare.audit import Audit, CpuTimes, wait_until_quiet

GROUP = 500


def _proc(root: Path, machine: str, processes: dict[int, tuple[str, int, int]]) -> Path:
    """A /proc with pid -> (command, group, user ticks)."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "stat").write_text(f"cpu  {machine}\ncpu0 1 2 3\n")
    (root / "self").mkdir(exist_ok=True)
    for pid, (command, group, ticks) in processes.items():
        directory = root / str(pid)
        directory.mkdir(exist_ok=True)
        fields = ["S", "1", str(group), "1", *["0"] * 7, str(ticks), "1", "2", "3", "20", "0"]
        (directory / "stat").write_text(f"{pid} ({command}) {' '.join(fields)}\n")
    return root


def test_own_time_is_that_of_the_group_with_children(tmp_path: Path) -> None:
    processes = {500: ("python", GROUP, 100), 501: ("a ) b (", GROUP, 50), 7: ("other", 7, 1000)}
    times = CpuTimes.read(GROUP, _proc(tmp_path, "10 0 20 300 5 0 0 15 0 0", processes))
    assert times == CpuTimes(total=350, busy=45, own=100 + 50 + 2 * (1 + 2 + 3))


def test_foreign_share_counts_steal_and_leaves_out_the_engine() -> None:
    earlier, later = CpuTimes(1000, 400, 50), CpuTimes(1200, 550, 150)
    assert later.foreign_since(earlier) == pytest.approx((150 - 100) / 200)


def test_rounding_of_ticks_gives_no_negative_share() -> None:
    assert CpuTimes(200, 100, 60).foreign_since(CpuTimes(100, 50, 0)) == 0.0


def test_without_proc_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CpuTimes.read(GROUP, tmp_path) is None
    monkeypatch.setattr(audit.CpuTimes, "read", classmethod(lambda cls, group: None))
    assert Audit(GROUP).foreign() is None
    wait_until_quiet(5.0, look_s=0.0)  # returns at once


def test_waiting_ends_when_the_others_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.5, 0.2, 0.01, 0.9])
    monkeypatch.setattr(audit.Audit, "foreign", lambda self: next(shares))
    wait_until_quiet(60.0, limit=0.05, look_s=0.0)
    assert next(shares) == 0.9


def test_waiting_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit.Audit, "foreign", lambda self: 1.0)
    wait_until_quiet(0.05, look_s=0.01)
