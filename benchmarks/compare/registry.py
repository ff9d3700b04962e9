"""All peers. A new one is a file `worker_<name>.py` with its `PEERS`, and one line here."""

from __future__ import annotations

from benchmarks.compare import worker_llama_cpp, worker_quire, worker_transformers, worker_vllm
from benchmarks.compare.peer import Peer

_MODULES = (worker_quire, worker_transformers, worker_vllm, worker_llama_cpp)
PEERS: dict[str, Peer] = {peer.name: peer for module in _MODULES for peer in module.PEERS}
REFERENCE = "quire"  # ratios are of this engine to each other one
DEFAULT = ("quire", "transformers", "vllm", "llama.cpp", "llama.cpp-server")
