"""`llama-server` of llama.cpp as a child process, asked over HTTP. Standard library only, Python 3.11."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare.protocol import end_with_parent

START_S = 120.0
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Answer:
    """The generated ids of one request, and how many of its prompt's tokens came out of a cache."""

    tokens: list[int]
    num_cached: int


class Server:
    """A server that was started and answers. It stays in this process's group, and ends with it.

    Args:
        binary: `llama-server`; its libraries lie beside it.
        model: a GGUF file.
        num_threads: of all computations.
        num_slots: requests that run at once.
        slot_tokens: most tokens of each.
        cache_type: of keys and values, as the server calls it.

    Raises:
        RuntimeError: it does not answer.
    """

    def __init__(
        self, binary: Path, model: str, num_threads: int, num_slots: int, slot_tokens: int, cache_type: str
    ) -> None:
        self._port = _free_port()
        threads = ("--threads", str(num_threads), "--threads-http", str(num_slots + 2))
        slots = ("--parallel", str(num_slots), "--ctx-size", str(num_slots * slot_tokens), "--no-kv-unified")
        # Without --cache-ram 0 a slot's cache is copied away before the slot takes its next request.
        others = ("--cache-ram", "0", "--cache-type-k", cache_type, "--cache-type-v", cache_type, "--no-ui")
        options = (*threads, *slots, *others)
        self.shown_command = " ".join(("llama-server", *options))
        self._num_slots = num_slots
        self._process = subprocess.Popen(
            [str(binary), "--model", model, "--host", HOST, "--port", str(self._port), *options],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            env=os.environ | {"LD_LIBRARY_PATH": str(binary.parent)},
            preexec_fn=end_with_parent,
        )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self._process.returncode}; see the log.")
            try:
                if self._ask("GET", "/health", None, timeout_s=5.0)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.02)
        raise RuntimeError(f"llama-server did not answer within {START_S:.0f} s; see the log.")

    def complete(self, prompts: Sequence[list[int]], output_lens: Sequence[int]) -> list[Answer]:
        """Ask for all at once, greedily and past every end-of-sequence token; answers in the same order.

        Raises:
            RuntimeError: a request was refused.
        """
        with ThreadPoolExecutor(max(1, len(prompts))) as pool:
            return list(pool.map(self._complete, prompts, output_lens))

    def _complete(self, prompt: list[int], output_len: int) -> Answer:
        body = {
            "prompt": prompt,
            "n_predict": output_len,
            "samplers": ["top_k"],  # of one: the likeliest token, without a sort of the vocabulary
            "top_k": 1,
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
        }
        status, answer = self._ask("POST", "/completion", body, timeout_s=3600.0)
        if status != 200:
            raise RuntimeError(f"llama-server refused a request of {len(prompt)} tokens: {answer}")
        return Answer(answer["tokens"], answer["timings"]["cache_n"])

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=timeout_s)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read() or b"null")
        finally:
            connection.close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]
