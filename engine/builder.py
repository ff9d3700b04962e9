"""Builds a running core from a configuration: resolve, load, size, compile. The one place that knows all the parts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from engine.built import BuiltEngine, Prepared, Stopwatch
from engine.bundle.load import load_bundle, open_bundle, require_right
from engine.bundle.manifest import is_bundle
from engine.config import DETERMINISTIC, QUANTIZATIONS, EngineConfig, Environment, ModelLoadConfig, reserve_gpu_memory
from engine.core import CoreOptions, EngineCore
from engine.errors import ConfigError, InvalidRequestError
from engine.input_processor import InputProcessor, ModelLimits
from engine.output_processor import OutputProcessor
from engine.replay.recorder import RecordingExecutor, header_of
from engine.runtime.compile import COUNTER, enable_persistent_cache
from engine.runtime.drafting.build import make_drafter
from engine.runtime.executables import ModelProgram
from engine.runtime.executor import Executor
from engine.runtime.filling import Filling
from engine.runtime.limits import RuntimeLimits, resolve_limits
from engine.runtime.lookup import Executables
from engine.runtime.memory import MemoryLedger, leaves_much, memory_limit, plan_blocks, require_one_request
from engine.runtime.progress import Report, progress_bar
from engine.runtime.speculation import make_speculator
from engine.runtime.threads import pin_workers
from engine.sampling_params import SamplingParams, sampling_defaults
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.pace import PromptPace
from engine.scheduling.scheduler import Scheduler
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
    environment = Environment.read()
    reserve_gpu_memory(config.cache.gpu_memory_utilization)  # before anything looks at the devices
    if not is_bundle(Path(config.load.model).expanduser()):
        built = assemble(config, prepare(config, environment))
        # Choices are made by tracing: what a first request needs has been traced now, which it need not have before.
        return replace(built, parts=replace(built.parts, implementations=_implementations(built.parts.quantization)))
    config, manifest = open_bundle(config)
    built = assemble(config, load_bundle(config, manifest, environment))
    try:
        require_right(built, manifest)
    except BaseException:
        built.close()
        raise
    return built


def prepare(config: EngineConfig, environment: Environment) -> Prepared:
    """Resolve, load, size, and compile as much as a first request needs, or all.

    Raises:
        As `build_engine`.
    """
    watch = Stopwatch()
    show = config.compile.show_progress
    with progress_bar("fetching", show=show) as report:
        options = fetch_options(config.load, environment, report)
        files = resolve_model(config.load.model, options, config.load.revision)
        tokenizer_path = _tokenizer_path(config.load, files, options)
    generation = dict(read_generation_config(files.path))
    _default_sampling(config.load, generation)  # what is wrong with it is said before anything is loaded
    watch.mark("resolve")
    with ThreadPoolExecutor(1) as beside:
        tokenizer = beside.submit(_load_tokenizer, tokenizer_path)
        with progress_bar("loading weights", show=show) as report:
            loaded = load_weights(config.load, files.path, report)
        draft = None
        if config.speculative.settings is not None and config.speculative.settings.model is not None:
            draft = _load_draft(config, environment, loaded)
        watch.mark("load")
        native.configure(environment.cache_dir / "native", config.kernels.cpu_compiler)
        ledger, program = make_program(config, loaded, environment.cache_dir / "xla", draft)
        watch.mark("size")
        grammars = beside.submit(make_grammars, tokenizer, loaded.config)
        filling = Filling.of(program.jobs(loaded.params), config.compile)
        filling.start()
        return Prepared(
            model=loaded.config,
            params=loaded.params,
            quantization=loaded.quantization,
            implementations=_implementations(loaded.quantization),
            program=program,
            ledger=ledger,
            executables=Executables(filling),
            tokenizer=tokenizer.result(),
            grammars=grammars.result(),
            tokenizer_path=tokenizer_path,
            default_sampling=_default_sampling(config.load, generation),
            generation=generation,
            watch=watch,
        )


def _wait_for_executables(config: EngineConfig, parts: Prepared) -> None:
    background = bool(config.compile.compile_in_background)
    if background and config.speculative.settings is not None:
        logger.info("compile_in_background: no, since speculative decoding measures every step shape at the start")
        background = False
    with progress_bar("compiling", show=config.compile.show_progress) as report:
        parts.executables.wait_for_first(parts.program.buckets, report, background=background)


def assemble(config: EngineConfig, parts: Prepared) -> BuiltEngine:
    """A core from its parts, once the executables are there that have to be.

    Raises:
        Exception: as making one of them raised.
    """
    limits, model, ledger = parts.program.limits, parts.model, parts.ledger
    try:
        executor = _make_executor(config, parts)
        parts.watch.mark("state")
        _wait_for_executables(config, parts)
    except BaseException:
        parts.executables.close()
        raise
    parts.watch.mark("compile")
    if config.kernels.pin_cpu_threads and jax.devices()[0].platform == "cpu":
        pin_workers()
    core = EngineCore(
        Scheduler(_scheduler_limits(config, limits), BlockPool(ledger.num_blocks), _pace(config, parts.program)),
        executor,
        OutputProcessor(parts.tokenizer),
        CoreOptions(overlap=config.scheduler.async_scheduling),
        parts.grammars,
        make_speculator(config.speculative.settings, executor),
    )
    model_limits = ModelLimits(model.vocab_size, limits.max_model_len, config.load.max_logprobs, model.eos_token_ids)
    inputs = InputProcessor(model_limits, parts.tokenizer, config.load.seed)
    parts.watch.mark("core")
    return BuiltEngine(core, inputs, parts, config)


def _make_executor(config: EngineConfig, parts: Prepared) -> Executor:
    """The executor; one that records, if the config says so.

    Raises:
        CacheWriteError: the recording cannot be made.
    """
    program, params, executables = parts.program, parts.params, parts.executables
    if config.debug.record is None:
        return Executor(program, params, executables)
    path = Path(config.debug.record).expanduser()
    return RecordingExecutor(program, params, executables, path, header_of(config, program, parts.ledger.num_blocks))


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


def _implementations(quantization: str | None) -> dict[str, str]:
    """What runs each operation of this model. The choices are noted per process: another engine may have had others."""
    chosen = chosen_implementations()
    return chosen if quantization else {name: chosen[name] for name in chosen if name != "quantized_matmul"}


def _load_tokenizer(path: Path | None) -> Tokenizer | None:
    return None if path is None else Tokenizer.load(path)


def make_grammars(tokenizer: Future[Tokenizer | None], model: ModelConfig) -> GrammarCompiler | None:
    """The compiler of grammars, once there is a tokenizer; None without one."""
    loaded = tokenizer.result()
    return None if loaded is None else GrammarCompiler(loaded, model.vocab_size, model.eos_token_ids)


def _default_sampling(config: ModelLoadConfig, generation: Mapping[str, Any]) -> SamplingParams:
    """What a request gets that brings no parameters.

    Raises:
        ConfigError: the model's recommendation is out of range.
    """
    if config.generation_config == "none":
        return SamplingParams()
    try:
        return sampling_defaults(generation)
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
    """Choose the number of KV blocks: guess, compile the largest bucket, ask XLA what it takes, correct the guess. Who
    is in a hurry, and has so much memory that the guess cannot be wrong, is spared the compilation.

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
    if config.compile.compile_in_background and leaves_much(guess):
        return guess, program
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
