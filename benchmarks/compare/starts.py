"""How long an engine takes from the start of its process to its first token, with and without compiled code.

A cold start gets empty directories for whatever the engine compiles (`Peer.cache_variables`), the warm start after it
the same directories again. The files of the libraries and of the model are in the operating system's cache in both, as
far as they fit: nothing is dropped. An engine that keeps nothing is as fast in both.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.compare.audit import Audit, wait_until_quiet
from benchmarks.compare.driver import Plan, facts_of
from benchmarks.compare.journal import Journal
from benchmarks.compare.peer import Peer
from benchmarks.compare.process import WorkerError, WorkerGoneError, WorkerProcess
from benchmarks.compare.protocol import Loaded
from benchmarks.compare.results import Start


class StartTimer:
    """Times starts, one worker at a time.

    Args:
        plan: whom to start, and the limits.
        start: starts the worker of a peer with some variables more.
        settings: what to load, per peer.
        journal: gets what is found out; starts that it holds already are not timed again.
        say: gets a line after each start.
    """

    def __init__(
        self,
        plan: Plan,
        start: Callable[[Peer, Mapping[str, str]], WorkerProcess],
        settings: Callable[[Peer], dict[str, Any]],
        journal: Journal,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self._plan = plan
        self._start = start
        self._settings = settings
        self._journal = journal
        self._say = say

    def measure(self, num_repetitions: int) -> int:
        """Time a cold and a warm start of every peer in each repetition. Returns the number of starts left over."""
        left = [
            (repetition, peer) for repetition, peer in self._turns(num_repetitions) if self._is_left(repetition, peer)
        ]
        for taken, (repetition, peer) in enumerate(left):
            if not self._has_time_for(peer):
                self._say(f"the time is over: {2 * (len(left) - taken)} starts are left")
                return 2 * (len(left) - taken)
            self._both(peer, repetition)
        return 0

    def _turns(self, num_repetitions: int) -> Iterator[tuple[int, Peer]]:
        for repetition in range(1, num_repetitions + 1):
            shift = repetition % len(self._plan.peers)
            for peer in self._plan.peers[shift:] + self._plan.peers[:shift]:
                yield repetition, peer

    def _is_left(self, repetition: int, peer: Peer) -> bool:
        return not any((s.repetition, s.peer) == (repetition, peer.name) for s in self._journal.starts)

    def _has_time_for(self, peer: Peer) -> bool:
        earlier = (s.seconds or 0.0 for s in self._journal.starts if s.peer == peer.name)
        return self._plan.has_time_for(2 * max(earlier, default=0.0))

    def _both(self, peer: Peer, repetition: int) -> None:
        """A pair is written down together: a warm start alone could not be taken again."""
        with tempfile.TemporaryDirectory(prefix="quire-start-") as directory:
            variables = {name: str(Path(directory, name.lower())) for name in peer.cache_variables}
            timed = [self._timed(peer, Start(peer.name, repetition, is_cold), variables) for is_cold in (True, False)]
        for start in timed:
            self._journal.add_start(start)

    def _timed(self, peer: Peer, blank: Start, variables: Mapping[str, str]) -> Start:
        wait_until_quiet(self._plan.quiet_wait_s)
        began = time.perf_counter()
        worker = self._start(peer, variables)
        audit = Audit(worker.group)
        seconds = error = foreign = None
        try:
            loaded = Loaded(**worker.ask("load", self._plan.timeout_s, settings=self._settings(peer)))
            seconds, foreign = time.perf_counter() - began, audit.foreign()
            if peer.name not in self._journal.peers:
                self._journal.add_peer(peer.name, facts_of(peer, loaded, seconds))
        except (WorkerError, WorkerGoneError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        finally:
            worker.close()
        kind = "cold" if blank.is_cold else "warm"
        self._say(f"{kind} start {blank.repetition}, {peer.name}: {error or f'{seconds:.1f} s'}")
        return Start(blank.peer, blank.repetition, blank.is_cold, seconds, foreign, error)
