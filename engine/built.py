"""What an engine is made of, and what it says of itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from engine.client import EngineInfo
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.input_processor import InputProcessor
from engine.runtime.executables import ModelProgram
from engine.runtime.limits import RuntimeLimits
from engine.runtime.lookup import Executables
from engine.runtime.memory import MemoryLedger
from engine.sampling_params import SamplingParams
from engine.snapshot import snapshot
from engine.structured.compiler import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from models.config import ModelConfig
from models.functional import Params


@dataclass
class Stopwatch:
    """Seconds of each part of the start, one after another.

    Attributes:
        times: "resolve": the model's files; "load": weights, onto the device; "size": how many KV blocks fit;
            "state": the device's state; "compile": executables, as many as had to be there, compiled or read, as far as
            they were not made beside the rest; "core": what is left; "probe": of a bundle.
    """

    times: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def mark(self, part: str) -> None:
        """A part is done."""
        now = time.monotonic()
        self.times[part] = now - self._last
        self._last = now


@dataclass(frozen=True)
class Prepared:
    """What a core is put together from, wherever it came from.

    Attributes:
        model: the decoder.
        params: its weights, on the device.
        quantization: in words; None if nothing is packed.
        implementations: operation -> what runs it.
        program: what the executables are made from.
        ledger: where the memory goes.
        executables: being made, or all there.
        tokenizer, grammars: None with `skip_tokenizer_init`.
        tokenizer_path: what another process loads the tokenizer from.
        default_sampling: what a request gets that brings no parameters.
        generation: the model's generation_config.json.
        watch: of the start.
    """

    model: ModelConfig
    params: Params
    quantization: str | None
    implementations: dict[str, str]
    program: ModelProgram
    ledger: MemoryLedger
    executables: Executables
    tokenizer: Tokenizer | None
    grammars: GrammarCompiler | None
    tokenizer_path: Path | None
    default_sampling: SamplingParams
    generation: dict[str, Any]
    watch: Stopwatch


@dataclass(frozen=True)
class BuiltEngine:
    """A core, ready to serve, and what it was built from."""

    core: EngineCore
    inputs: InputProcessor
    parts: Prepared
    config: EngineConfig

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None with `skip_tokenizer_init`."""
        return self.parts.tokenizer

    @property
    def tokenizer_path(self) -> Path | None:
        """What another process loads the tokenizer from."""
        return self.parts.tokenizer_path

    @property
    def model(self) -> ModelConfig:
        """The decoder."""
        return self.parts.model

    @property
    def limits(self) -> RuntimeLimits:
        """What the executables are built for."""
        return self.parts.program.limits

    @property
    def ledger(self) -> MemoryLedger:
        """Where the memory goes."""
        return self.parts.ledger

    @property
    def default_sampling(self) -> SamplingParams:
        """What a request gets that brings no parameters."""
        return self.parts.default_sampling

    def close(self) -> None:
        """Make no more executables."""
        self.parts.executables.close()

    def info(self) -> EngineInfo:
        """What a client needs to know."""
        return EngineInfo(
            model=self.config.load.model,
            vocab_size=self.model.vocab_size,
            embedding_size=self.model.hidden_size,
            max_model_len=self.limits.max_model_len,
            max_num_seqs=self.limits.max_num_seqs,
            max_logprobs=self.config.load.max_logprobs,
            eos_token_ids=tuple(self.model.eos_token_ids),
            num_kv_blocks=self.ledger.num_blocks - 1,
            block_size=self.limits.block_size,
            priorities=self.config.scheduler.scheduling_policy == "priority",
            default_sampling=self.default_sampling,
            description=self.describe(),
        )

    def snapshot(self) -> dict[str, Any]:
        """Counters and gauges of this moment, and the settings that they are to be read with."""
        cache = {
            "block_size": self.limits.block_size,
            "num_gpu_blocks": self.ledger.num_blocks - 1,
            "cache_dtype": self.limits.kv_dtype,
            "enable_prefix_caching": self.config.cache.enable_prefix_caching,
            "gpu_memory_utilization": self.config.cache.gpu_memory_utilization,
        }
        return {**snapshot(self.core), "cache_config": cache}

    def describe(self) -> dict[str, Any]:
        """What was built, for logs and for users."""
        device = jax.devices()[0]
        return {
            "model_family": self.model.family,
            "vocab_size": self.model.vocab_size,
            "device": f"{device.platform}:{device.device_kind}",
            "dtype": self.limits.dtype,
            "kv_cache_dtype": self.limits.kv_dtype,
            "quantization": self.parts.quantization,
            "implementations": dict(self.parts.implementations),
            "max_model_len": self.limits.max_model_len,
            "max_num_seqs": self.limits.max_num_seqs,
            "max_num_batched_tokens": self.limits.max_num_batched_tokens,
            "block_size": self.limits.block_size,
            "num_kv_blocks": self.ledger.num_blocks - 1,
            "kv_cache_tokens": (self.ledger.num_blocks - 1) * self.limits.block_size,
            "memory": str(self.ledger),
            "num_executables": self.parts.executables.stats.num_all,
            "num_executables_ready": self.parts.executables.stats.num_ready,
            "start_s": self.parts.watch.times,
        }
