"""How much of the machine others used while an engine was measured (Linux; elsewhere nothing is known).

foreign = CPU time of everything but the engine's own processes / CPU time of all cores. Time that a hypervisor gave to
other machines ("steal") counts as foreign. The driver and workers that should be idle count as foreign too, so a peer
that spins between its turns is seen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
DISTURBED = 0.10  # a sample with more foreign time than this is marked


@dataclass(frozen=True)
class CpuTimes:
    """Clock ticks since boot (the machine) or since their start (the processes of one group).

    Attributes:
        total, busy: of all cores; busy includes steal.
        own: of the processes of the engine under test.
    """

    total: int
    busy: int
    own: int

    @classmethod
    def read(cls, group: int, proc: Path = PROC) -> CpuTimes | None:
        """Now. None where there is no /proc/stat.

        Args:
            group: process group of the engine's processes; workers lead one of their own.
        """
        try:
            fields = [int(word) for word in (proc / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return None
        idle = fields[3] + fields[4]  # idle, and idle with a disk access outstanding
        return cls(sum(fields), sum(fields) - idle, _ticks_of_group(group, proc))

    def foreign_since(self, earlier: CpuTimes) -> float:
        """Fraction (0 to 1) of all cores' time since then that went to others."""
        total = max(1, self.total - earlier.total)
        return max(0.0, (self.busy - earlier.busy - (self.own - earlier.own)) / total)


def _ticks_of_group(group: int, proc: Path) -> int:
    ticks = 0
    for directory in proc.iterdir():
        if not directory.name.isdigit():
            continue
        try:
            stat = (directory / "stat").read_text()
        except OSError:
            continue  # ended meanwhile
        fields = stat.rpartition(")")[2].split()  # the command's name may hold anything, brackets included
        if int(fields[2]) == group:
            ticks += sum(int(field) for field in fields[11:15])  # own and waited-for children's, user and system
    return ticks


class Audit:
    """Foreign CPU share of the time since it was made."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._started = CpuTimes.read(group)

    def foreign(self) -> float | None:
        """Fraction of all cores' time, or None if unknown."""
        now = CpuTimes.read(self._group)
        return None if now is None or self._started is None else now.foreign_since(self._started)


def wait_until_quiet(most_s: float, limit: float = DISTURBED / 2, look_s: float = 0.5) -> None:
    """Wait until others use less than `limit` of the machine, at most `most_s` seconds."""
    deadline = time.monotonic() + most_s
    while time.monotonic() < deadline:
        audit = Audit(group=-1)
        time.sleep(look_s)
        foreign = audit.foreign()
        if foreign is None or foreign < limit:
            return
