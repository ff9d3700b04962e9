"""What executables depend on: the same key, the same executables."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from engine.config import EngineConfig, xla_flags
from engine.errors import BundleError

ROOT = Path(__file__).parents[2]
PACKAGES = ("engine", "models", "pallas_kernels")  # `serving` changes no executable
SOURCES = (".py", ".cc", ".h", ".json")  # tuned tile sizes are JSON

# Settings that shape executables or weights; all others may differ from start to start.
SHAPING = (
    "dtype",
    "quantization",
    "load_format",
    "max_model_len",
    "block_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "kv_cache_dtype",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_chunked_prefill",
    "attention_implementation",
    "matmul_implementation",
    "cpu_compiler",
    "speculative_config",
    "tokenizer",
    "skip_tokenizer_init",
    "revision",
)


def current_key() -> dict[str, str]:
    """Of this process. Opens the device."""
    device = jax.devices()[0]
    return {
        "quire": sources_digest(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": f"{device.platform}: {device.device_kind}",
        "runtime": str(device.client.platform_version),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else str(os.cpu_count()),
        "xla_flags": xla_flags(),
    }


def sources_digest() -> str:
    """Of Quire's own files: any change may change an executable."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for directory, folders, files in os.walk(ROOT / package):
            folders.sort()
            for name in sorted(files):
                if name.endswith(SOURCES):
                    path = Path(directory) / name
                    digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _processor() -> str:
    """Model and instructions of the processor: executables for a CPU use all that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines[:40])}
    features = hashlib.sha256(" ".join(sorted(first.get("flags", "").split())).encode()).hexdigest()[:16]
    return f"{first.get('model name', '?')}, instructions {features}"


def require_fresh(path: Path, made_for: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Refuse a bundle that was made for something else.

    Raises:
        BundleError: says what differs, and the command that makes the bundle anew.
    """
    current = current_key()
    differs = [name for name in {**made_for, **current} if made_for.get(name) != current.get(name)]
    if differs:
        what = "; ".join(f"{name} was {made_for.get(name)}, is {current.get(name)}" for name in differs)
        raise BundleError(f"{path} was made for something else: {what}. Make it anew: {remake_command(path, settings)}")


def remake_command(path: Path, settings: Mapping[str, Any]) -> str:
    """The command that makes a bundle with these settings."""
    defaults = EngineConfig().flat()
    flags = ""
    for name in SHAPING:
        value = settings.get(name, defaults[name])
        if value == defaults[name]:
            continue
        flag = name.replace("_", "-")
        flags += f" --{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f" --{flag} '{value}'"
    return f"quire compile '{settings['model']}' -o '{path}' --force{flags}"


def settings_of(config: EngineConfig, path: Path, made_with: Mapping[str, Any]) -> EngineConfig:
    """The settings that an engine of a bundle has: what shapes executables is the bundle's, the rest as asked for.

    Raises:
        BundleError: something that shapes executables was asked for, and the bundle has it otherwise.
    """
    asked, defaults = config.flat(), EngineConfig().flat()
    for name in SHAPING:
        if asked[name] != defaults[name] and asked[name] != made_with[name]:
            raise BundleError(
                f"{path} was made with {name}={made_with[name]!r}, and {asked[name]!r} is asked for. Leave it out, or "
                f"make another bundle: {remake_command(path, {**made_with, name: asked[name]})}"
            )
        asked[name] = made_with[name]
    if asked["compile_in_background"] is None:
        asked["compile_in_background"] = True
    return EngineConfig.from_flat(**asked)
