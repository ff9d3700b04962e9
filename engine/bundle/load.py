"""From a bundle to the parts of an engine: check, map, read, and no step is traced or compiled."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from engine.built import BuiltEngine, Prepared, Stopwatch
from engine.bundle.files import digest_of, map_arrays, read_checked, require_trusted, unpack_executable
from engine.bundle.key import remake_command, require_fresh, settings_of
from engine.bundle.manifest import TOKENIZER_NAME, TREES_NAME, WEIGHTS_NAME, Manifest, read_manifest
from engine.bundle.probe import ask, compare
from engine.config import EngineConfig, Environment, reserve_gpu_memory
from engine.errors import BundleError
from engine.runtime.compile import enable_persistent_cache
from engine.runtime.executables import ModelProgram, structure_of
from engine.runtime.filling import Compiled, Filling, Job
from engine.runtime.lookup import Executables
from engine.runtime.memory import MIB, memory_limit
from engine.sampling_params import SamplingParams, sampling_defaults
from engine.structured.compiler import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from pallas_kernels import native
from pallas_kernels.kv_layout import KVLayout

logger = logging.getLogger("quire")


def open_bundle(config: EngineConfig) -> tuple[EngineConfig, Manifest]:
    """Check whose a bundle is, what it was made for, and that its weights and work space fit.

    Returns:
        The settings of an engine of it, and what it holds.

    Raises:
        BundleError: it must not be used; says why.
    """
    path = Path(config.load.model).expanduser()
    require_trusted(path, config.load.trust_bundle)
    manifest = read_manifest(path)
    require_fresh(path, manifest.key, manifest.settings)
    config = settings_of(config, path, manifest.settings)
    limit = memory_limit(config.cache, reserve_gpu_memory(config.cache.gpu_memory_utilization))
    if manifest.ledger.total > limit:
        raise BundleError(
            f"{path} was made for {manifest.ledger.total / MIB:,.0f} MiB of memory, and there are {limit / MIB:,.0f}. "
            f"Make it anew: {remake_command(path, manifest.settings)}"
        )
    return config, manifest


def load_bundle(config: EngineConfig, manifest: Manifest, environment: Environment) -> Prepared:
    """The parts of an engine.

    Args:
        config: of `open_bundle`.

    Raises:
        BundleError: a file is damaged, or native kernels are missing.
    """
    watch, path = Stopwatch(), Path(config.load.model).expanduser()
    enable_persistent_cache(config.compile, environment.cache_dir / "xla")  # for the few small functions besides steps
    native.configure(environment.cache_dir / "native", config.kernels.cpu_compiler)
    # Executables name its functions, so it has to be registered before one is read.
    if manifest.uses_native and native.unavailable() is not None:
        raise BundleError(f"{path} needs native kernels, which are not there: {native.unavailable()}.")
    program = _program(config, manifest)
    watch.mark("resolve")
    filling = Filling.of(program.jobs({}), config.compile, partial(_read_executable, path, manifest))
    with ThreadPoolExecutor(2) as beside:
        digest = beside.submit(digest_of, path / WEIGHTS_NAME)
        tokenizer = beside.submit(_tokenizer, path, manifest)
        grammars = beside.submit(_grammars, tokenizer, manifest)
        filling.start()
        try:
            params = map_arrays(path / WEIGHTS_NAME, manifest.arrays, read_checked(path, TREES_NAME, manifest.digests))
            if digest.result() != manifest.digests[WEIGHTS_NAME]:
                raise BundleError(f"{path / WEIGHTS_NAME} is damaged: its digest is another. Make the bundle anew.")
            compiler = grammars.result()
        except BaseException:
            filling.stop()
            raise
    watch.mark("load")
    return Prepared(
        model=manifest.model,
        params=params,
        quantization=manifest.quantization,
        implementations=manifest.implementations,
        program=program,
        ledger=manifest.ledger,
        executables=Executables(filling),
        tokenizer=tokenizer.result(),
        grammars=compiler,
        tokenizer_path=path / TOKENIZER_NAME if manifest.has_tokenizer else None,
        default_sampling=_default_sampling(config, manifest),
        generation=manifest.generation,
        watch=watch,
    )


def require_right(built: BuiltEngine, manifest: Manifest) -> None:
    """Ask the probe, and refuse an engine that answers otherwise than the one that the bundle was made from.

    Raises:
        BundleError: it does.
    """
    started = time.monotonic()
    difference = compare(manifest.probe, ask(built, manifest.probe.prompt_token_ids))
    built.parts.watch.mark("probe")
    if difference is not None:
        path = built.config.load.model
        raise BundleError(
            f"{path} does not compute what it did when it was made: {difference}. "
            f"Make it anew: {remake_command(Path(path), manifest.settings)}"
        )
    logger.info("bundle: the probe is right (%.2f s)", time.monotonic() - started)


def _program(config: EngineConfig, manifest: Manifest) -> ModelProgram:
    model, limits = manifest.model, manifest.limits
    num_pages = max(2, manifest.ledger.num_blocks)
    cache = KVLayout(num_pages, model.num_kv_heads, limits.block_size, model.head_dim, limits.kv_dtype)
    structure = structure_of(model, limits, config.kernels, lazy=True)
    return ModelProgram(structure, model, limits, cache, config.kernels)


def _read_executable(path: Path, manifest: Manifest, job: Job) -> Compiled:
    file = manifest.executables.get(job.name)
    if file is None:
        raise BundleError(f"{path} has no executable for {job.name}.")
    return unpack_executable(read_checked(path, file, manifest.digests))


def _tokenizer(path: Path, manifest: Manifest) -> Tokenizer | None:
    if not manifest.has_tokenizer:
        return None
    for name in (name for name in manifest.digests if name.startswith(f"{TOKENIZER_NAME}/")):
        read_checked(path, name, manifest.digests)
    return Tokenizer.load(path / TOKENIZER_NAME)


def _grammars(tokenizer: Future[Tokenizer | None], manifest: Manifest) -> GrammarCompiler | None:
    loaded, model = tokenizer.result(), manifest.model
    return None if loaded is None else GrammarCompiler(loaded, model.vocab_size, model.eos_token_ids)


def _default_sampling(config: EngineConfig, manifest: Manifest) -> SamplingParams:
    return SamplingParams() if config.load.generation_config == "none" else sampling_defaults(manifest.generation)
