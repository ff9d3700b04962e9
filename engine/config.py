"""The engine's configuration: frozen parts, validated once, and the one reader of the environment.

Every consumer gets only its own part (`CacheConfig` goes to the block pool, `SchedulerConfig` to the scheduler …).
Field names and defaults are vLLM's where the thing is the same. The metadata of each field (`help`, `choices`) makes
the command line flags.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

from engine.errors import ConfigError
from engine.speculative.settings import SpeculativeSettings, parse_speculative
from models.quantization.schemes import KEEP_BLOCKS, SCHEMES

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "orbax", "dummy")
GENERATION_CONFIGS = ("auto", "none")
POLICIES = ("fcfs", "priority")
IMPLEMENTATIONS = ("auto", "reference", "xla", "mosaic_gpu", "mosaic_gpu_simulated", "native_cpu")
DETERMINISTIC = "native_cpu"  # the implementation whose results for a row depend on nothing beside it
KV_CACHE_DTYPES = ("auto", "int8", "fp8", "fp8_e4m3")
QUANTIZATIONS = (*SCHEMES, KEEP_BLOCKS)


def _setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:  # noqa: A002 - argparse's own word
    return field(default=default, metadata={"help": help, "choices": choices})


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


_TYPES: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "int": ("an integer", int),
    "float": ("a number", (int, float)),
    "str": ("text", str),
    "bool": ("True or False", bool),
    "None": ("None", NoneType),
}


def _check_types(part: Any) -> None:
    """Refuse what is not of its field's type: `max_num_seqs="8"` would fail far from here, and say nothing of it."""
    for setting in fields(part):
        value, kinds = getattr(part, setting.name), str(setting.type).split(" | ")
        fits = isinstance(value, tuple(_TYPES[kind][1] for kind in kinds))
        if isinstance(value, bool):
            fits = "bool" in kinds
        expected = " or ".join(_TYPES[kind][0] for kind in kinds)
        _check(fits, f"{setting.name} must be {expected}, got {value!r}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _check(value in choices, f"{name} must be one of {', '.join(choices)}; got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class ModelLoadConfig:
    """Which model, in which precision, from which files."""

    model: str = _setting("demo", "model directory, .gguf file, hub id, or 'demo' (SmolLM2-135M-Instruct)")
    tokenizer: str | None = _setting(None, "tokenizer directory or hub id, if not the model's own")
    skip_tokenizer_init: bool = _setting(False, "load no tokenizer: prompts are token ids, outputs have no text")
    dtype: str = _setting("auto", "dtype of weights and activations; auto = the checkpoint's own", DTYPES)
    quantization: str | None = _setting(
        None,
        "round the layers' matrices while loading; gguf = keep a GGUF file's blocks packed; default: as the checkpoint "
        "has them, GGUF dequantized",
        QUANTIZATIONS,
    )
    load_format: str = _setting("auto", "format of the weights; dummy = seeded random weights", LOAD_FORMATS)
    max_model_len: int | None = _setting(None, "longest prompt + output, in tokens; default: the model's own limit")
    revision: str | None = _setting(None, "branch, tag or commit of the hub repository")
    download_dir: str | None = _setting(None, "where downloaded models are kept; default: the user's cache")
    trust_bundle: bool = _setting(
        False, "load a bundle although others could have written it: it is machine code that runs with your rights"
    )
    generation_config: str = _setting(
        "auto",
        "sampling where a request says nothing: auto = as the model's generation_config.json",
        GENERATION_CONFIGS,
    )
    max_logprobs: int = _setting(20, "largest logprobs a request may ask for; -1 = the whole vocabulary")
    seed: int = _setting(0, "seed of dummy weights and of requests that bring none")

    def __post_init__(self) -> None:
        _check_types(self)
        _check(bool(self.model), "model must not be empty.")
        _check_choice("dtype", self.dtype, DTYPES)
        if self.quantization is not None:
            _check_choice("quantization", self.quantization, QUANTIZATIONS)
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        _check_choice("generation_config", self.generation_config, GENERATION_CONFIGS)
        _check(
            self.max_model_len is None or self.max_model_len >= 2,
            f"max_model_len must be at least 2, got {self.max_model_len}.",
        )
        _check(self.max_logprobs >= -1, f"max_logprobs must be -1 or more, got {self.max_logprobs}.")
        _check(self.seed >= 0, f"seed must be 0 or more, got {self.seed}.")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = _setting(16, "tokens per KV block")
    gpu_memory_utilization: float = _setting(0.92, "fraction of a GPU's memory that the engine may fill")
    kv_cache_memory_bytes: int | None = _setting(None, "bytes for KV blocks; overrides the memory ledger")
    num_gpu_blocks_override: int | None = _setting(None, "number of KV blocks; overrides the memory ledger")
    kv_cache_dtype: str = _setting(
        "auto", "what keys and values are kept as; auto = the dtype of the activations", KV_CACHE_DTYPES
    )
    enable_prefix_caching: bool = _setting(True, "share KV blocks between requests with equal prefixes")

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _check(
            self.block_size in (8, 16, 32, 64, 128), f"block_size must be 8, 16, 32, 64 or 128; got {self.block_size}."
        )
        _check(
            0 < self.gpu_memory_utilization <= 1,
            f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}.",
        )
        _check(
            self.kv_cache_memory_bytes is None or self.kv_cache_memory_bytes > 0,
            f"kv_cache_memory_bytes must be positive, got {self.kv_cache_memory_bytes}.",
        )
        _check(
            self.num_gpu_blocks_override is None or self.num_gpu_blocks_override >= 2,
            f"num_gpu_blocks_override must be at least 2, got {self.num_gpu_blocks_override}.",
        )


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What one step may hold and who goes first."""

    max_num_seqs: int | None = _setting(None, "most sequences in one step; default: 64 on CPU, 256 on GPU")
    max_num_batched_tokens: int | None = _setting(None, "most tokens in one step; default: 2048 on CPU, 8192 on GPU")
    enable_chunked_prefill: bool = _setting(True, "split long prompts over several steps")
    long_prefill_token_threshold: int = _setting(0, "most prompt tokens of one request per step; 0 = no limit")
    scheduling_policy: str = _setting("fcfs", "order of waiting requests", POLICIES)
    itl_target_ms: float | None = _setting(
        None, "milliseconds between two tokens of a stream that long prompts should not exceed: they are split to fit"
    )
    async_scheduling: bool = _setting(True, "plan one step ahead of the device")
    max_num_queued_reqs: int | None = _setting(None, "most waiting requests; more are refused")
    max_num_queued_tokens: int | None = _setting(None, "most prompt tokens of waiting requests; more are refused")

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choice("scheduling_policy", self.scheduling_policy, POLICIES)
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs", "max_num_queued_tokens"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"{name} must be at least 1, got {value}.")
        threshold = self.long_prefill_token_threshold
        _check(threshold >= 0, f"long_prefill_token_threshold must be 0 or more, got {threshold}.")
        _check(
            threshold == 0 or self.enable_chunked_prefill,
            f"long_prefill_token_threshold={threshold} splits prompts, which enable_chunked_prefill=False forbids.",
        )
        target = self.itl_target_ms
        _check(target is None or 0 < target < math.inf, f"itl_target_ms must be a positive number, got {target}.")
        _check(
            target is None or self.enable_chunked_prefill,
            f"itl_target_ms={target} splits prompts, which enable_chunked_prefill=False forbids.",
        )


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """How step functions are compiled and kept."""

    compilation_cache_dir: str | None = _setting(
        None, "persistent compilation cache; default: the user's cache; '' = none"
    )
    compile_threads: int | None = _setting(
        None, "executables compiled at a time; default: the number of cores, at most 8"
    )
    compile_in_background: bool | None = _setting(
        None,
        "start as soon as a first request can be answered, and make the other executables meanwhile; default: yes in "
        "serve, generate and chat, and of a bundle",
    )
    show_progress: bool = _setting(True, "progress bars while loading and compiling")

    def __post_init__(self) -> None:
        _check_types(self)
        threads = self.compile_threads
        _check(threads is None or threads >= 1, f"compile_threads must be at least 1, got {threads}.")


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Which implementation runs: 'auto' climbs the ladder and logs its choice, a name runs or refuses."""

    attention_implementation: str = _setting("auto", "implementation of paged attention", IMPLEMENTATIONS)
    matmul_implementation: str = _setting(
        "auto", "implementation of products with weights, quantized or not", IMPLEMENTATIONS
    )
    cpu_compiler: str = _setting(
        "auto", "C++ compiler of native kernels on a CPU; auto = the one installed, '' = no such kernels"
    )
    pin_cpu_threads: bool = _setting(True, "on a CPU, keep each of XLA's worker threads on a core of its own")
    deterministic: bool = _setting(
        False,
        "bit for bit the same tokens and log-probabilities whatever else runs: other requests, chunks, cache hits, "
        "preemptions, restarts; on a CPU with a C++ compiler",
    )

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("attention_implementation", "matmul_implementation"):
            value = getattr(self, name)
            _check_choice(name, value, IMPLEMENTATIONS)
            _check(
                not self.deterministic or value in ("auto", DETERMINISTIC),
                f"deterministic=True needs {name}='auto' or {DETERMINISTIC!r}, got {value!r}.",
            )

    @property
    def named(self) -> KernelConfig:
        """The same with the names that it implies."""
        if not self.deterministic:
            return self
        return replace(self, attention_implementation=DETERMINISTIC, matmul_implementation=DETERMINISTIC)


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Speculative decoding."""

    speculative_config: str | None = _setting(
        None, 'guess tokens to come: a JSON object such as {"method": "ngram", "num_speculative_tokens": 5}'
    )

    def __post_init__(self) -> None:
        _check_types(self)
        if self.speculative_config is not None:
            parse_speculative(self.speculative_config)

    @property
    def settings(self) -> SpeculativeSettings | None:
        """What it says; None if it is not set."""
        return None if self.speculative_config is None else parse_speculative(self.speculative_config)


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Finding faults."""

    record: str | None = _setting(
        None, "write every step to this file, prompts and answers included, for `quire replay`; is overwritten"
    )

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self.record != "", "record must name a file.")


PARTS = ("load", "cache", "scheduler", "compile", "kernels", "speculative", "debug")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All of the engine's configuration, by part."""

    load: ModelLoadConfig = field(default_factory=ModelLoadConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def flat(self) -> dict[str, Any]:
        """All settings by name, plain values: what `from_flat` makes an equal configuration of."""
        return {f.name: getattr(part, f.name) for name in PARTS for part in [getattr(self, name)] for f in fields(part)}

    @classmethod
    def from_flat(cls, **settings: Any) -> EngineConfig:
        """Sort flat keyword arguments (`Engine("demo", block_size=32)`, command line flags) into their parts.

        Raises:
            ConfigError: a keyword is unknown, or a value is out of range.
        """
        part_types = {f.name: f.default_factory for f in fields(cls)}
        owners = {f.name: part for part, kind in part_types.items() for f in fields(kind)}  # type: ignore[arg-type]
        unknown = sorted(set(settings) - set(owners))
        if unknown:
            raise ConfigError(f"Unknown setting {', '.join(unknown)}. Known settings: {', '.join(sorted(owners))}.")
        grouped: dict[str, dict[str, Any]] = {part: {} for part in part_types}
        for name, value in settings.items():
            grouped[owners[name]][name] = _plain(value)
        return cls(**{part: part_types[part](**values) for part, values in grouped.items()})  # type: ignore[operator]


def _plain(value: Any) -> Any:
    """A setting as its part keeps it: paths and JSON objects as text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return json.dumps(value) if isinstance(value, dict) else value


@dataclass(frozen=True)
class Environment:
    """What the process environment says. Nothing else in the project reads it."""

    cache_dir: Path
    hf_token: str | None
    offline: bool
    api_keys: tuple[str, ...] = ()

    @classmethod
    def read(cls) -> Environment:
        """Read `QUIRE_CACHE` (default: `quire` in `$XDG_CACHE_HOME` or `~/.cache`), `HF_TOKEN`, `HF_HUB_OFFLINE` and
        `QUIRE_API_KEY` (of the server; several are separated by commas).
        """
        xdg = os.environ.get("XDG_CACHE_HOME")
        default = Path(xdg) if xdg else Path.home() / ".cache"
        return cls(
            cache_dir=Path(os.environ.get("QUIRE_CACHE") or default / "quire"),
            hf_token=os.environ.get("HF_TOKEN"),
            offline=os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes"),
            api_keys=tuple(key for key in os.environ.get("QUIRE_API_KEY", "").split(",") if key),
        )


def xla_flags() -> str:
    """Flags of XLA and of its runtime, which change what it compiles."""
    return " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")).strip()


def worker_environment() -> dict[str, str]:
    """The environment of a Python process that finds the modules that this one finds, wherever it was started."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


_MEMORY_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the old name
_DEFAULT_MEMORY_FRACTION = 0.75


def reserve_gpu_memory(fraction: float) -> float:
    """Have JAX take this fraction of a GPU's memory, instead of its 75 %, unless the user has said how much.

    Works only before JAX first looks at its devices; afterwards what it took then stays.

    Returns:
        The fraction that is in force.
    """
    said = next((os.environ[name] for name in _MEMORY_FRACTIONS if os.environ.get(name)), None)
    if said is None:
        if _jax_has_devices():
            return _DEFAULT_MEMORY_FRACTION
        os.environ[_MEMORY_FRACTIONS[0]] = said = str(fraction)
    return float(said)


def _jax_has_devices() -> bool:
    """Whether this process has opened its devices. Asked without importing JAX."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()
