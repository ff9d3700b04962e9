"""The workers of llama.cpp: its library through llama-cpp-python's bindings, and its own server.

One build of the library, made for this machine's processor, serves both (`build_llama_cpp.py`).

- `llama.cpp` calls the library in this process. One request at a time is a plain loop of `llama_decode`; several at
  once run in our own continuous batching (`llama_batch.Schedule`), as the library has none: up to 64 sequences with a
  cache each, batches of at most 2048 tokens. The next token is the largest logit, found by numpy. In W4 the shared
  prefix is computed once and copied to every sequence: knowledge that a server does not have.
- `llama.cpp-server` starts `llama-server` with 64 slots and asks it over HTTP, with token ids and without streaming:
  its scheduler is llama.cpp's own. HTTP and making text of the tokens are in its times, a few ms a request.

The bindings are imported inside `load`: the driver imports this file for `PEERS` and has none.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.ceilings import Ceilings, numpy_ceilings
from benchmarks.compare.llama_batch import Context, Row, Schedule
from benchmarks.compare.llama_server import Server
from benchmarks.compare.peer import ModelForm, Peer, Precision
from benchmarks.compare.protocol import Job, Loaded, Sample, Stopwatch, serve

_LIBRARY: dict[str, Any] = {"module": "benchmarks.compare.worker_llama_cpp", "environment": "llama-cpp"}
_SERVER: dict[str, Any] = _LIBRARY | {
    "settings": {"server": True},
    "unsupported": dict.fromkeys(
        ("w1", "w3"), "one request alone is measured through the library, without HTTP: see llama.cpp"
    ),
}
_Q8_0 = Precision(body_bytes=34 / 32, head_bytes=34 / 32, multiplies_int8=True)  # a block: 32 numbers, a 16-bit scale
PEERS = (
    Peer(
        name="llama.cpp",
        about="llama.cpp's library; many requests: continuous batching of our own",
        model=ModelForm.GGUF,
        **_LIBRARY,
    ),
    Peer(
        name="llama.cpp-server",
        about="llama.cpp's `llama-server`, 64 slots, over HTTP",
        model=ModelForm.GGUF,
        **_SERVER,
    ),
    Peer(
        name="llama.cpp-q8_0",
        about="llama.cpp's library with Q8_0 weights; many requests: continuous batching of our own",
        model=ModelForm.GGUF_Q8_0,
        precision=_Q8_0,
        **_LIBRARY,
    ),
    Peer(
        name="llama.cpp-server-q8_0",
        about="llama.cpp's `llama-server` with Q8_0 weights, 64 slots, over HTTP",
        model=ModelForm.GGUF_Q8_0,
        precision=_Q8_0,
        **_SERVER,
    ),
)

DISTRIBUTIONS = ("llama_cpp_python", "numpy")
BUILD = Path(sys.prefix, "llama.cpp", "bin")
NUM_SLOTS = 64
SLOT_TOKENS = 1536  # the longest request of W2 has 1468; 64 of these take about 2.2 GiB in 16 bits
CACHE_TYPES = {"float32": 0}  # ggml's number of the type; other dtypes keep the library's default, float16


class LibraryUnderTest:
    """llama.cpp in this process. See `protocol.EngineUnderTest`."""

    def __init__(self) -> None:
        self._llama: Any = None
        self._one: Context | None = None
        self._many: Context | None = None
        self._num_threads = 1
        self._quiet: Any = None

    def load(self, settings: dict[str, Any]) -> Loaded:
        """Load the model; `settings`: model, dtype, num_threads, max_model_len."""
        os.environ["LLAMA_CPP_LIB_PATH"] = str(BUILD)
        import llama_cpp

        self._llama, self._num_threads = llama_cpp, settings["num_threads"]
        # Its log is long; the callback must live as long as the library may call it.
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(settings["model"].encode(), params)
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {Path(settings['model']).name}")
        cache_type = CACHE_TYPES.get(settings["dtype"])
        threads = self._num_threads
        self._one = Context(llama_cpp, model, 1, settings["max_model_len"], threads, cache_type)
        # One sequence more, which holds a shared prefix.
        self._many = Context(llama_cpp, model, NUM_SLOTS + 1, SLOT_TOKENS, threads, cache_type)
        self.run(Job([[100]], [1]))
        versions = {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}
        system = llama_cpp.llama_print_system_info().decode().strip()
        return Loaded(versions, {"weights": Path(settings["model"]).name, "system": system})

    def run(self, job: Job) -> Sample:
        """Run one job."""
        return self._single(job) if len(job.prompts) == 1 else self._batch(job)

    def _single(self, job: Job) -> Sample:
        (prompt,), (output_len,) = job.prompts, job.output_lens
        context = self._one
        assert context is not None
        context.clear()
        tokens: list[int] = []
        times: list[float] = []
        clock = Stopwatch()
        for start in range(0, len(prompt), Context.BATCH):
            part = range(start, min(len(prompt), start + Context.BATCH))
            chosen = context.compute([Row(prompt[at], at, 0, at == len(prompt) - 1) for at in part])
        while True:
            tokens.append(chosen[0])
            times.append(clock())
            if len(tokens) == output_len:
                return Sample(clock(), [tokens], times if job.stream else [], 0)
            chosen = context.compute([Row(tokens[-1], len(prompt) + len(tokens) - 1, 0, True)])

    def _batch(self, job: Job) -> Sample:
        context, shared = self._many, _shared_len(job.prompts)
        assert context is not None
        context.clear()
        schedule = Schedule(job.prompts, job.output_lens, NUM_SLOTS, Context.BATCH, shared)
        num_cached = 0
        clock = Stopwatch()
        if shared:
            context.compute([Row(job.prompts[0][at], at, NUM_SLOTS, False) for at in range(shared)])
        while True:
            for slot in schedule.admit():
                if shared:
                    context.copy(NUM_SLOTS, slot)
                    num_cached += shared
            rows = schedule.batch()
            if not rows:
                # The prefix was computed for the first of them.
                return Sample(clock(), schedule.outputs, num_cached_tokens=max(0, num_cached - shared))
            for slot in schedule.commit(rows, context.compute(rows)):
                context.forget(slot)

    def ceilings(self) -> Ceilings:
        """Through numpy: llama.cpp hands out no products."""
        return numpy_ceilings(self._num_threads)


def _shared_len(prompts: list[list[int]]) -> int:
    """Leading tokens that all prompts have in common, short of a whole prompt; 0 if few: copying would not pay."""
    shortest = min(map(len, prompts)) - 1
    same = next((at for at in range(shortest) if len({prompt[at] for prompt in prompts}) > 1), shortest)
    return same if same >= 32 else 0


class ServerUnderTest:
    """llama.cpp's server. See `protocol.EngineUnderTest`."""

    def __init__(self) -> None:
        self._server: Server | None = None
        self._num_threads = 1

    def load(self, settings: dict[str, Any]) -> Loaded:
        """Start the server; `settings`: model, dtype, num_threads."""
        self._num_threads = settings["num_threads"]
        kind = "f32" if settings["dtype"] == "float32" else "f16"
        binary = BUILD / "llama-server"
        self._server = Server(binary, settings["model"], self._num_threads, NUM_SLOTS, SLOT_TOKENS, kind)
        self.run(Job([[100]], [1]))
        versions = {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}
        return Loaded(versions, {"weights": Path(settings["model"]).name, "command": self._server.shown_command})

    def run(self, job: Job) -> Sample:
        """Run one job."""
        assert self._server is not None
        clock = Stopwatch()
        answers = self._server.complete(job.prompts, job.output_lens)
        wall_s = clock()
        return Sample(
            wall_s, [answer.tokens for answer in answers], num_cached_tokens=sum(a.num_cached for a in answers)
        )

    def ceilings(self) -> Ceilings:
        """Through numpy."""
        return numpy_ceilings(self._num_threads)


class LlamaUnderTest:
    """Either of them, by the settings it is loaded with. See `protocol.EngineUnderTest`."""

    def __init__(self) -> None:
        self._chosen: LibraryUnderTest | ServerUnderTest | None = None

    @property
    def chosen(self) -> LibraryUnderTest | ServerUnderTest:
        """The one, after `load`."""
        if self._chosen is None:
            raise RuntimeError("the worker was asked to run before it was asked to load.")
        return self._chosen

    def load(self, settings: dict[str, Any]) -> Loaded:
        """Load; `settings`: `server`, and those of the one that it chooses."""
        self._chosen = ServerUnderTest() if settings.get("server") else LibraryUnderTest()
        return self._chosen.load(settings)

    def run(self, job: Job) -> Sample:
        """Run one job."""
        return self.chosen.run(job)

    def ceilings(self) -> Ceilings:
        """See the chosen one."""
        return self.chosen.ceilings()


if __name__ == "__main__":
    serve(LlamaUnderTest())
