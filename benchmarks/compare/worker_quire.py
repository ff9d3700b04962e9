"""Quire's worker: `Engine.stream` for streamed jobs, `Engine.generate` for the rest, no detokenization."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from benchmarks.ceilings import Ceilings, numpy_ceilings
from benchmarks.compare.peer import ModelForm, Peer, Precision
from benchmarks.compare.protocol import Job, Loaded, Sample, Stopwatch, serve
from benchmarks.expected_compiles import expected_compiles
from benchmarks.roofline import jax_ceilings
from engine import Engine, SamplingParams
from engine.outputs import RequestOutput

_SHARED: dict[str, Any] = {
    "module": "benchmarks.compare.worker_quire",
    "environment": "",
    "model": ModelForm.REFERENCE,
    "cache_variables": ("QUIRE_CACHE",),
}
PEERS = (
    Peer(name="quire", about="Quire, `Engine.generate` and `Engine.stream`, default settings", **_SHARED),
    Peer(
        name="quire-int8",
        about='Quire with `quantization="int8"`: 8-bit weights of the layers, one scale per output',
        settings={"quantization": "int8"},
        precision=Precision(body_bytes=1.0),
        **_SHARED,
    ),
    Peer(
        name="quire-int8w8a8",
        about='Quire with `quantization="int8_w8a8"`: 8-bit weights and activations of the layers',
        settings={"quantization": "int8_w8a8"},
        precision=Precision(body_bytes=1.0, multiplies_int8=True),
        **_SHARED,
    ),
)

DISTRIBUTIONS = ("jax", "jaxlib", "numpy")


def _params(output_len: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output_len, detokenize=False)


class QuireUnderTest:
    """See `protocol.EngineUnderTest`."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._settings: dict[str, Any] = {}

    @property
    def engine(self) -> Engine:
        """The engine, after `load`."""
        if self._engine is None:
            raise RuntimeError("the worker was asked to run before it was asked to load.")
        return self._engine

    def load(self, settings: dict[str, Any]) -> Loaded:
        """Start the engine; `settings`: model, dtype, max_model_len, num_threads, and any setting of `Engine`."""
        self._settings = settings
        own = {name: value for name, value in settings.items() if name not in ("model", "num_threads")}
        self._engine = Engine(settings["model"], skip_tokenizer_init=True, show_progress=False, **own)
        self._engine.generate([[100]], _params(1))
        versions = {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}
        return Loaded(versions, dict(self._engine.describe()))

    def run(self, job: Job) -> Sample:
        """Run one job."""
        compiles_before = self.engine.metrics()["compiles_after_ready"]
        sample = self._stream(job) if job.stream else self._generate(job)
        compiled = self.engine.metrics()["compiles_after_ready"] - compiles_before
        if compiled:
            raise RuntimeError(f"{compiled} executables were compiled during a measured run")
        return sample

    def _stream(self, job: Job) -> Sample:
        (prompt,), (output_len,) = job.prompts, job.output_lens
        times: list[float] = []
        tokens: list[int] = []
        cached = 0
        clock = Stopwatch()
        for output in self.engine.stream(prompt, _params(output_len)):
            if output.outputs[0].token_ids:
                times.append(clock())
                tokens += output.outputs[0].token_ids
            cached = output.num_cached_tokens
        return Sample(clock(), [tokens], times, cached)

    def _generate(self, job: Job) -> Sample:
        params = [_params(length) for length in job.output_lens]
        clock = Stopwatch()
        outputs: list[RequestOutput] = self.engine.generate(job.prompts, params)
        wall_s = clock()
        failed = [output.error for output in outputs if output.error is not None]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(outputs)} requests failed, the first with: {failed[0]}")
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return Sample(wall_s, tokens, num_cached_tokens=sum(output.num_cached_tokens for output in outputs))

    def ceilings(self) -> Ceilings:
        """Through numpy and XLA."""
        with expected_compiles():
            return numpy_ceilings(self._settings["num_threads"]).merged(jax_ceilings((self._settings["dtype"],)))


if __name__ == "__main__":
    serve(QuireUnderTest())
