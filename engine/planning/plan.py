"""`make_plan`: the facade of `quire plan`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

from engine.builder import fetch_options
from engine.config import EngineConfig, Environment
from engine.errors import ConfigError
from engine.planning.devices import PlanDevice, device_of
from engine.planning.estimates import StepCosts, decode_floor, prefill_floor, work_space
from engine.planning.report import COMPILED, ESTIMATED, CapacityPlan, Concurrency, WorkSpace
from engine.planning.weights import PlannedWeights, plan_weights
from engine.runtime.buckets import BucketTable, geometric
from engine.runtime.compile import COUNTER, enable_persistent_cache
from engine.runtime.executables import ModelProgram
from engine.runtime.limits import RuntimeLimits, resolve_limits
from engine.runtime.memory import MemoryLedger, plan_blocks, require_one_request
from engine.runtime.progress import Report
from models.loading.resolver import resolve_config
from models.parameters import parameter_shapes
from pallas_kernels import native

COMPUTE = {"w8a8": "int8", "w8a8_fp8": "float8"}  # kind of a packed weight -> dtype of its products, if not its inputs'
LENGTHS = (512, 2048, 8192)  # of sequences, unless others are asked for


def make_plan(
    config: EngineConfig,
    device: str = "cpu",
    memory: int | None = None,
    lengths: Sequence[int] | None = None,
    progress: Report | None = None,
) -> CapacityPlan:
    """Plan an engine. No weights are read and no device but this machine's CPU is touched.

    Args:
        config: as of the engine.
        device: a key of `devices.json`.
        memory: bytes of the device; None = as in `devices.json`, of a CPU this machine's.
        lengths: prompt and output together, of the sequences whose number is asked for; None = `LENGTHS` and
            `max_model_len`.
        progress: called while files are fetched.

    Raises:
        ConfigError: the device is not known, a length or the memory is out of range, settings contradict each other.
        OutOfMemoryError: not even one request of `max_model_len` fits.
        QuireError: of the kind that fits: model not found, unsupported, damaged.
    """
    target, environment = device_of(device), Environment.read()
    if memory is not None and memory < 1:
        raise ConfigError(f"memory must be a positive number of bytes, got {memory}.")
    options = fetch_options(config.load, environment, progress or (lambda done, total, what: None))
    files = resolve_config(config.load.model, options, config.load.revision)
    with COUNTER.building():
        weights = plan_weights(config.load, files.path, target.multiplies_e4m3)
        dtype = str(weights.dtype)
        limits = resolve_limits(config, weights.config, dtype, weights.kv_cache_dtype, on_cpu=target.on_cpu)
        program = ModelProgram.of(weights.config, limits, 2, config.kernels)
        if target.on_cpu:
            native.configure(environment.cache_dir / "native", config.kernels.cpu_compiler)
            enable_persistent_cache(config.compile, environment.cache_dir / "xla")
        ledger, largest = _size(config, target, memory, weights, program)
    return _report(config, target, weights, limits, ledger, largest, _lengths(lengths, limits))


def _size(
    config: EngineConfig, device: PlanDevice, memory: int | None, weights: PlannedWeights, program: ModelProgram
) -> tuple[MemoryLedger, WorkSpace]:
    """As `engine.builder` sizes an engine: the memory's share, less weights, work space and state, in blocks.

    Raises:
        OutOfMemoryError: not even one request of `max_model_len` fits.
    """
    limits, bucket = program.limits, program.largest
    whole = memory or device.memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = whole if device.on_cpu else int(whole * config.cache.gpu_memory_utilization)

    def ledger_for(temporaries: int) -> MemoryLedger:
        return plan_blocks(
            config.cache,
            limit=limit,
            weights=sum(weights.sizes.values()),
            temporaries=temporaries,
            state=program.state_bytes,
            block=program.block_bytes,
            useful_blocks=limits.max_num_seqs * limits.max_blocks_per_seq,
            on_cpu=device.on_cpu,
        )

    how, size = ESTIMATED, work_space(weights.config, limits.dtype, bucket)
    if device.on_cpu and config.load.quantization != "gguf":
        guess = ledger_for(0)
        require_one_request(guess, max_model_len=limits.max_model_len, block_size=limits.block_size)
        lowered = program.with_pages(max(2, guess.num_blocks)).lower_forward(bucket, weights.shapes())
        stats = lowered.compile().memory_analysis()
        size = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        how = COMPILED
    ledger = ledger_for(size)
    require_one_request(ledger, max_model_len=limits.max_model_len, block_size=limits.block_size)
    return ledger, WorkSpace(bucket.num_tokens, bucket.num_seqs, size, how)


def _lengths(asked: Sequence[int] | None, limits: RuntimeLimits) -> list[int]:
    most = limits.max_model_len
    if asked is None:
        return [*(length for length in LENGTHS if length < most), most]
    for length in asked:
        if not 1 <= length <= most:
            raise ConfigError(f"a length must be from 1 to max_model_len={most}, got {length}.")
    return sorted(set(asked))


def _report(
    config: EngineConfig,
    device: PlanDevice,
    weights: PlannedWeights,
    limits: RuntimeLimits,
    ledger: MemoryLedger,
    largest: WorkSpace,
    lengths: list[int],
) -> CapacityPlan:
    model, usable = weights.config, ledger.num_blocks - 1
    concurrency = [_concurrency(length, usable, limits) for length in lengths]
    kinds = {storage.kind for storage in weights.storages.values()}
    compute = next((COMPUTE[kind] for kind in kinds if kind in COMPUTE), limits.dtype)
    costs = StepCosts.of(model, weights.sizes, limits.dtype, compute, ledger.block // limits.block_size)
    decode = [
        decode_floor(costs, device, seqs, each.length, seqs <= each.by_memory)
        for each in concurrency
        for seqs in geometric(1, limits.max_num_seqs)[:: 2 if limits.max_num_seqs > 8 else 1]
    ]
    return CapacityPlan(
        model=config.load.model,
        device=device.key,
        device_name=device.name,
        device_source=device.source,
        family=model.family,
        num_layers=model.num_layers,
        num_parameters=_num_parameters(weights),
        dtype=limits.dtype,
        quantization=config.load.quantization,
        kv_cache_dtype=limits.kv_dtype,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        block_size=limits.block_size,
        limit=ledger.limit,
        weights=ledger.weights,
        state=ledger.state,
        block=ledger.block,
        work_space=largest,
        buckets=_buckets(weights, limits, largest),
        num_blocks=usable,
        longest=min(usable * limits.block_size, limits.max_model_len),
        concurrency=tuple(concurrency),
        decode=_known(decode),
        prefill=_known(prefill_floor(costs, device, tokens) for tokens in lengths),
        notes=tuple(_notes(config, device, largest)),
    )


def _known[T](found: Iterable[T | None]) -> tuple[T, ...]:
    return tuple(each for each in found if each is not None)


def _concurrency(length: int, num_blocks: int, limits: RuntimeLimits) -> Concurrency:
    # The last token of a sequence needs no room: nothing is sampled after it.
    by_memory = num_blocks // -(-max(1, length - 1) // limits.block_size)
    return Concurrency(length, by_memory, min(by_memory, limits.max_num_seqs))


def _num_parameters(weights: PlannedWeights) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(weights.config).values())


def _buckets(weights: PlannedWeights, limits: RuntimeLimits, largest: WorkSpace) -> tuple[WorkSpace, ...]:
    table = BucketTable(limits.max_num_batched_tokens, limits.max_num_seqs)
    shapes = sorted(table.all())
    return tuple(
        largest
        if (shape.num_tokens, shape.num_seqs) == (largest.num_tokens, largest.num_seqs)
        else WorkSpace(shape.num_tokens, shape.num_seqs, work_space(weights.config, limits.dtype, shape), ESTIMATED)
        for shape in shapes
    )


def _notes(config: EngineConfig, device: PlanDevice, largest: WorkSpace) -> Iterable[str]:
    yield "Bytes of weights, state and KV blocks are exact: they come from the shapes that the engine allocates."
    if largest.how == COMPILED:
        yield "The work space of the largest step is XLA's own figure for this machine's CPU; others are estimates."
    else:
        yield "The work space is estimated from the shapes of a layer; an engine compiles its largest step to know it."
    if device.bytes_per_s is None:
        yield "No floors: the bandwidth of this CPU is not known."
    else:
        yield "Floors are bytes over bandwidth and operations over rate by the datasheet: nothing can be faster."
    if (config.load.quantization or "").startswith("fp8") and not device.multiplies_e4m3:
        yield "The device has no products of 8-bit floats: fp8 weights are multiplied in the activations' dtype."
