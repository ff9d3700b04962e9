"""All peers. A new one is a file `worker_<name>.py` with its `PEERS`, and one line here."""

from __future__ import annotations

from benchmarks.compare import worker_quire, worker_transformers
from benchmarks.compare.peer import Peer

PEERS: dict[str, Peer] = {peer.name: peer for module in (worker_quire, worker_transformers) for peer in module.PEERS}
REFERENCE = "quire"  # ratios are of this engine to each other one
DEFAULT = ("quire", "transformers")
