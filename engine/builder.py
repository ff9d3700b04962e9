"""Builds a running core from a configuration: resolve, load, size, compile. The one place that knows all the parts."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from engine.client import EngineInfo
from engine.config import DETERMINISTIC, QUANTIZATIONS, EngineConfig, Environment, ModelLoadConfig, reserve_gpu_memory
from engine.core import CoreOptions, EngineCore
from engine.errors import ConfigError, InvalidRequestError
from engine.input_processor import InputProcessor, ModelLimits
from engine.output_processor import OutputProcessor
from engine.replay.recorder import RecordingExecutor, header_of
from engine.runtime.compile import COUNTER, enable_persistent_cache
from engine.runtime.drafting.build import make_drafter
from engine.runtime.executables import Executables, ModelProgram, compile_program
from engine.runtime.executor import Executor
from engine.runtime.limits import RuntimeLimits, resolve_limits
from engine.runtime.memory import MemoryLedger, memory_limit, plan_blocks, require_one_request
from engine.runtime.progress import Report, progress_bar
from engine.runtime.speculation import make_speculator
from engine.runtime.threads import pin_workers
from engine.sampling_params import SamplingParams, sampling_defaults
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.pace import PromptPace
from engine.scheduling.scheduler import Scheduler
from engine.snapshot import snapshot
from engine.speculative.settings import HEADS
from engine.structured.compiler import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from models.config import ModelConfig
from models.functional import Params
from models.loading.load import LoadedModel, load_model, read_generation_config
from models.loading.resolver import FetchOptions, ModelFiles, resolve_model, resolve_tokenizer
from pallas_kernels import native
from pallas_kernels.device import current_device
from pallas_kernels.matmul import OP as MATMUL
from pallas_kernels.op import UnsupportedImplementationError
from pallas_kernels.registry import chosen_implementations
from pallas_kernels.rowwise import OP as ROWWISE
from pallas_kernels.rowwise import RowwiseProblem

logger = logging.getLogger("quire")


@dataclass(frozen=True)
class StartTimes:
    """Seconds of each part of the start."""

    resolve_s: float
    load_s: float
    compile_s: float


@dataclass(frozen=True)
class BuiltEngine:
    """A core, ready to serve, and what it was built from."""

    core: EngineCore
    inputs: InputProcessor
    tokenizer: Tokenizer | None
    model: ModelConfig
    limits: RuntimeLimits
    ledger: MemoryLedger
    times: StartTimes
    num_executables: int
    implementations: dict[str, str]
    quantization: str | None
    default_sampling: SamplingParams
    tokenizer_path: Path | None
    config: EngineConfig

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
            "quantization": self.quantization,
            "implementations": dict(self.implementations),
            "max_model_len": self.limits.max_model_len,
            "max_num_seqs": self.limits.max_num_seqs,
            "max_num_batched_tokens": self.limits.max_num_batched_tokens,
            "block_size": self.limits.block_size,
            "num_kv_blocks": self.ledger.num_blocks - 1,
            "kv_cache_tokens": (self.ledger.num_blocks - 1) * self.limits.block_size,
            "memory": str(self.ledger),
            "num_executables": self.num_executables,
            "start_s": {"resolve": self.times.resolve_s, "load": self.times.load_s, "compile": self.times.compile_s},
        }


def build_engine(config: EngineConfig) -> BuiltEngine:
    """Build everything and compile every executable.

    Raises:
        QuireError: of the kind that fits: model not found, unsupported, damaged, settings that contradict, not enough
            memory.
    """
    try:
        with COUNTER.building():
            return _build(config)
    except UnsupportedImplementationError as error:  # one that the settings name
        raise ConfigError(f"{error}.") from error


def _build(config: EngineConfig) -> BuiltEngine:
    environment, started = Environment.read(), time.monotonic()
    reserve_gpu_memory(config.cache.gpu_memory_utilization)  # before anything looks at the devices
    show = config.compile.show_progress
    with progress_bar("fetching", show=show) as report:
        options = fetch_options(config.load, environment, report)
        files = resolve_model(config.load.model, options, config.load.revision)
        tokenizer_path = _tokenizer_path(config.load, files, options)
        tokenizer = None if tokenizer_path is None else Tokenizer.load(tokenizer_path)
    default_sampling = _default_sampling(config.load, files)
    resolved = time.monotonic()
    with progress_bar("loading weights", show=show) as report:
        loaded = load_weights(config.load, files.path, report)
    loaded_at = time.monotonic()

    draft = None
    if config.speculative.settings is not None and config.speculative.settings.model is not None:
        draft = _load_draft(config, environment, loaded)
    native.configure(environment.cache_dir / "native", config.kernels.cpu_compiler)
    ledger, program = make_program(config, loaded, environment.cache_dir / "xla", draft)
    limits = program.limits
    with progress_bar("compiling", show=show) as report, ThreadPoolExecutor(1) as beside:
        grammars = beside.submit(_make_grammars, tokenizer, loaded.config)
        executables = compile_program(program, loaded.params, config.compile, report)
    executor = _make_executor(config, program, loaded.params, executables, ledger.num_blocks)
    if config.kernels.pin_cpu_threads and jax.devices()[0].platform == "cpu":
        pin_workers()
    times = StartTimes(resolved - started, loaded_at - resolved, time.monotonic() - loaded_at)
    core = EngineCore(
        Scheduler(_scheduler_limits(config, limits), BlockPool(ledger.num_blocks), _pace(config, program)),
        executor,
        OutputProcessor(tokenizer),
        CoreOptions(overlap=config.scheduler.async_scheduling),
        grammars.result(),
        make_speculator(config.speculative.settings, executor),
    )
    model_limits = ModelLimits(
        loaded.config.vocab_size, limits.max_model_len, config.load.max_logprobs, loaded.config.eos_token_ids
    )
    inputs = InputProcessor(model_limits, tokenizer, config.load.seed)
    return BuiltEngine(
        core=core,
        inputs=inputs,
        tokenizer=tokenizer,
        model=loaded.config,
        limits=limits,
        ledger=ledger,
        times=times,
        num_executables=len(executables),
        implementations=_implementations(loaded),
        quantization=loaded.quantization,
        default_sampling=default_sampling,
        tokenizer_path=tokenizer_path,
        config=config,
    )


def _make_executor(
    config: EngineConfig, program: ModelProgram, params: Params, executables: Executables, num_blocks: int
) -> Executor:
    """The executor; one that records, if the config says so.

    Raises:
        CacheWriteError: the recording cannot be made.
    """
    if config.debug.record is None:
        return Executor(program, params, executables)
    path = Path(config.debug.record).expanduser()
    return RecordingExecutor(program, params, executables, path, header_of(config, program, num_blocks))


def fetch_options(config: ModelLoadConfig, environment: Environment, report: Report) -> FetchOptions:
    """Where and how models are fetched."""
    return FetchOptions(
        cache_dir=environment.cache_dir,
        download_dir=Path(config.download_dir).expanduser() if config.download_dir else None,
        offline=environment.offline,
        hf_token=environment.hf_token,
        progress=report,
    )


def _tokenizer_path(config: ModelLoadConfig, files: ModelFiles, options: FetchOptions) -> Path | None:
    if config.skip_tokenizer_init:
        return None
    return files.path if config.tokenizer is None else resolve_tokenizer(config.tokenizer, options)


def _implementations(loaded: LoadedModel) -> dict[str, str]:
    """What runs each operation of this model. The choices are noted per process: another engine may have had others."""
    chosen = chosen_implementations()
    return chosen if loaded.quantization else {name: chosen[name] for name in chosen if name != "quantized_matmul"}


def _make_grammars(tokenizer: Tokenizer | None, model: ModelConfig) -> GrammarCompiler | None:
    return None if tokenizer is None else GrammarCompiler(tokenizer, model.vocab_size, model.eos_token_ids)


def _default_sampling(config: ModelLoadConfig, files: ModelFiles) -> SamplingParams:
    """What a request gets that brings no parameters.

    Raises:
        ConfigError: the model's recommendation is out of range.
    """
    if config.generation_config == "none":
        return SamplingParams()
    try:
        return sampling_defaults(read_generation_config(files.path))
    except InvalidRequestError as error:
        raise ConfigError(f"The model's generation_config.json: {error} Set generation_config='none'.") from error


def load_weights(config: ModelLoadConfig, path: Path, report: Report) -> LoadedModel:
    """A model's config and its parameters, on the device.

    Raises:
        As `load_model`.
    """
    loaded = load_model(path, config.load_format, config.dtype, config.seed, report, config.quantization)
    jax.block_until_ready(loaded.params)
    return loaded


def _load_draft(config: EngineConfig, environment: Environment, loaded: LoadedModel) -> LoadedModel | Path:
    """The draft model's weights, in the model's dtype; of heads, the directory.

    Raises:
        As `load_model`.
    """
    settings, show = config.speculative.settings, config.compile.show_progress
    assert settings is not None and settings.model is not None
    quantization = settings.quantization
    try:
        load = replace(config.load, model=settings.model, dtype=loaded.dtype, quantization=quantization, revision=None)
    except ConfigError as error:
        raise ConfigError(f"speculative_config: {error}") from error
    with progress_bar("fetching the draft model", show=show) as report:
        files = resolve_model(load.model, fetch_options(load, environment, report))
    if settings.method in HEADS:
        return files.path
    with progress_bar("loading the draft model", show=show) as report:
        return load_weights(load, files.path, report)


def make_program(
    config: EngineConfig, loaded: LoadedModel, cache_dir: Path, draft: LoadedModel | Path | None = None
) -> tuple[MemoryLedger, ModelProgram]:
    """What the executables of a loaded model are made from, with as many KV blocks as fit.

    Args:
        cache_dir: of compiled executables, unless the config names another.
        draft: a smaller model that guesses, or the directory of heads.

    Raises:
        ConfigError: settings contradict the model or each other.
        OutOfMemoryError: not even one request of `max_model_len` fits.
        CacheWriteError: the cache cannot be made.
    """
    matmul = config.kernels.matmul_implementation
    of_dense = ["auto", *(each.name for each in MATMUL.implementations)]
    if loaded.quantization is None and matmul not in of_dense:
        raise ConfigError(
            f"matmul_implementation={matmul!r} is of products with quantized weights, and this model has none. "
            f"Set quantization to one of {', '.join(QUANTIZATIONS)}, or take one of {', '.join(of_dense)}."
        )
    dtype = loaded.dtype
    limits = resolve_limits(config, loaded.config, dtype, loaded.kv_cache_dtype)
    enable_persistent_cache(config.compile, cache_dir)
    if config.kernels.deterministic:
        _require_deterministic(loaded.config)
    program = ModelProgram.of(loaded.config, limits, 2, config.kernels.named)
    drafter = make_drafter(config.speculative.settings, program, loaded.params, draft)
    ledger, program = _size(config, replace(program, drafter=drafter), loaded.params)
    logger.info("memory: %s", ledger)
    return ledger, program


def _require_deterministic(model: ModelConfig) -> None:
    """Refuse what cannot be computed so that a row's bits depend on nothing beside it.

    Raises:
        ConfigError: the device, or what the model's rows pass through.
    """
    for function, activation in (("norm", None), ("gate", model.activation), ("heads", None)):
        problem = RowwiseProblem(function, "float32", activation)
        native_rows = next(each for each in ROWWISE.implementations if each.name == DETERMINISTIC)
        reason = native_rows.refuses(problem, current_device())
        if reason is not None:
            raise ConfigError(f"deterministic=True cannot be had here: {reason}.")


def _size(config: EngineConfig, smallest: ModelProgram, params: Params) -> tuple[MemoryLedger, ModelProgram]:
    """Choose the number of KV blocks: guess, compile the largest bucket, ask XLA what it takes, correct the guess.

    Raises:
        OutOfMemoryError: not even one request of `max_model_len` fits.
    """
    limits, drafter = smallest.limits, smallest.drafter
    useful = limits.max_num_seqs * limits.max_blocks_per_seq
    weights = sum(array.on_device_size_in_bytes() for array in jax.tree.leaves(params))
    weights += 0 if drafter is None else drafter.extra_bytes

    def ledger_for(temporaries: int) -> MemoryLedger:
        return plan_blocks(
            config.cache,
            limit=memory_limit(config.cache, reserve_gpu_memory(config.cache.gpu_memory_utilization)),
            weights=weights,
            temporaries=temporaries,
            state=smallest.state_bytes,
            block=smallest.block_bytes,
            useful_blocks=useful,
            on_cpu=jax.devices()[0].platform == "cpu",
        )

    guess = ledger_for(0)
    require_one_request(guess, max_model_len=limits.max_model_len, block_size=limits.block_size)
    program = smallest.with_pages(max(2, guess.num_blocks))
    stats = program.lower_forward(program.largest, params).compile().memory_analysis()
    temporaries = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    ledger = ledger_for(temporaries)
    require_one_request(ledger, max_model_len=limits.max_model_len, block_size=limits.block_size)
    return ledger, smallest.with_pages(max(2, ledger.num_blocks))


def _pace(config: EngineConfig, program: ModelProgram) -> PromptPace | None:
    target_ms = config.scheduler.itl_target_ms
    if target_ms is None:
        return None
    return PromptPace(
        target_ms / 1e3, [bucket.num_tokens for bucket in program.buckets.all() if bucket.num_logits == 1]
    )


def _scheduler_limits(config: EngineConfig, limits: RuntimeLimits) -> SchedulerLimits:
    scheduler = config.scheduler
    return SchedulerLimits(
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        block_size=limits.block_size,
        long_prefill_token_threshold=scheduler.long_prefill_token_threshold,
        enable_chunked_prefill=scheduler.enable_chunked_prefill,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        policy=scheduler.scheduling_policy,
        max_num_queued_reqs=scheduler.max_num_queued_reqs,
        max_num_queued_tokens=scheduler.max_num_queued_tokens,
    )
