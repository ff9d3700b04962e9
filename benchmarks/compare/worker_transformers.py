"""The worker of Hugging Face transformers, in two kinds: `generate` on left-padded batches, and continuous batching.

W2 (many requests of different lengths) is run in two ways with `generate`: all in one batch, and in batches of 16
sorted by output length. Sorting uses knowledge that a server does not have: it favours the peer. A batch generates
until its longest request is done; shorter ones are cut to their length afterwards.

Imports torch and transformers inside `load`: the driver imports this file for `PEERS` and has neither.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from benchmarks.ceilings import Ceilings, numpy_ceilings
from benchmarks.compare.peer import ModelForm, Peer
from benchmarks.compare.protocol import Job, Loaded, Sample, Stopwatch, serve
from benchmarks.compare.torch_ceilings import torch_ceilings

_SHARED: dict[str, Any] = {
    "module": "benchmarks.compare.worker_transformers",
    "environment": "transformers",
    "model": ModelForm.HF_DIRECTORY,
    "process_environment": {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
}
PEERS = (
    Peer(
        name="transformers",
        about="transformers `generate`, SDPA attention, left padding",
        variants={"w2": ("batch-all", "batch-16-sorted")},
        **_SHARED,
    ),
    Peer(
        name="transformers-continuous",
        about="transformers continuous batching (`init_continuous_batching`), default settings but a bounded cache",
        settings={"continuous": True},
        **_SHARED,
    ),
)

DISTRIBUTIONS = ("torch", "transformers", "numpy")
PAD = 0  # masked out; any id of the vocabulary will do
BATCHES = {"": None, "batch-all": None, "batch-16-sorted": 16}


def batches_of(output_lens: list[int], size: int | None) -> list[list[int]]:
    """Indices of the requests of each batch: all in one, or sorted by output length and cut into `size`."""
    if size is None:
        return [list(range(len(output_lens)))]
    order = sorted(range(len(output_lens)), key=lambda index: output_lens[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


class TransformersUnderTest:
    """See `protocol.EngineUnderTest`."""

    def __init__(self) -> None:
        self._torch: Any = None
        self._model: Any = None
        self._clock_class: Any = None
        self._manager: Any = None
        self._num_threads = 1

    def load(self, settings: dict[str, Any]) -> Loaded:
        """Load the model.

        Args:
            settings: model, dtype, num_threads; for continuous batching also `continuous`, max_model_len and
                kv_cache_memory_bytes.
        """
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self._torch, self._num_threads = torch, settings["num_threads"]
        torch.set_num_threads(self._num_threads)

        class TokenClock(transformers.StoppingCriteria):
            """Notes when each step has its tokens; never stops anything."""

            def __init__(self, clock: Stopwatch) -> None:
                self.clock = clock
                self.times: list[float] = []

            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                self.times.append(self.clock())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        self._clock_class = TokenClock
        model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=settings["dtype"], attn_implementation="sdpa"
        ).eval()
        model.generation_config.eos_token_id = model.config.eos_token_id = None  # lengths are exact
        model.generation_config.pad_token_id = PAD
        self._model = model
        if settings.get("continuous"):
            self._manager = self._start_manager(settings)
        self.run(Job([[100]], [1]))
        versions = {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}
        return Loaded(versions, {"attention": model.config._attn_implementation, "dtype": str(model.dtype)})

    def _start_manager(self, settings: dict[str, Any]) -> Any:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = self._model.config
        limits = ContinuousBatchingConfig()
        # Left open, its cache takes nine tenths of the free memory, which the other engines need.
        elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        block_bytes = elements * limits.page_size * self._model.dtype.itemsize
        limits.num_blocks = settings["kv_cache_memory_bytes"] // block_bytes
        greedy = GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=PAD, max_new_tokens=settings["max_model_len"]
        )
        manager = self._model.init_continuous_batching(generation_config=greedy, continuous_batching_config=limits)
        manager.warmup()
        manager.start()
        return manager

    def run(self, job: Job) -> Sample:
        """Run one job."""
        if self._manager is not None:
            return self._run_continuous(job)
        clock = Stopwatch()
        outputs: list[list[int]] = [[] for _ in job.prompts]
        times: list[float] = []
        for batch in batches_of(job.output_lens, BATCHES[job.variant]):
            lengths = [job.output_lens[index] for index in batch]
            rows, times = self._generate([job.prompts[index] for index in batch], max(lengths), clock)
            for index, row, length in zip(batch, rows, lengths, strict=True):
                outputs[index] = row[:length]
        return Sample(clock(), outputs, times if job.stream else [])

    def _generate(
        self, prompts: list[list[int]], output_len: int, clock: Stopwatch
    ) -> tuple[list[list[int]], list[float]]:
        """One left-padded batch: the new ids of each row, and when each step had its tokens."""
        torch = self._torch
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        token_clock = self._clock_class(clock)
        with torch.inference_mode():
            generated = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=output_len,
                do_sample=False,
                stopping_criteria=[token_clock],
            )
        return generated[:, longest:].tolist(), token_clock.times

    def _run_continuous(self, job: Job) -> Sample:
        manager = self._manager
        clock = Stopwatch()
        # Equal prefixes one after the other: its own `generate_batch` orders requests so that blocks can be shared.
        order = sorted(range(len(job.prompts)), key=lambda index: job.prompts[index], reverse=True)
        index_of = {
            manager.add_request(
                job.prompts[index], max_new_tokens=job.output_lens[index], streaming=job.stream, eos_token_id=-1
            ): index
            for index in order
        }
        outputs: list[list[int]] = [[] for _ in job.prompts]
        times: list[float] = []
        unfinished = len(job.prompts)
        while unfinished:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the continuous batching thread ended")
                continue
            if result.error:
                raise RuntimeError(f"request {result.request_id} failed: {result.error}")
            if job.stream and result.generated_tokens:
                times.append(clock())
            if result.is_finished():
                outputs[index_of[result.request_id]] = list(result.generated_tokens)
                unfinished -= 1
        return Sample(clock(), outputs, times)

    def ceilings(self) -> Ceilings:
        """Through numpy and torch."""
        dtype = str(self._model.dtype).removeprefix("torch.")
        return numpy_ceilings(self._num_threads).merged(torch_ceilings(dtype, self._num_threads))


if __name__ == "__main__":
    serve(TransformersUnderTest())
