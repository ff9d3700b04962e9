"""The environment that ahead-of-time compilation needs, and the way into it.

XLA and Mosaic GPU say what their assembler said only if the process started with certain variables. Nothing here reads
or changes the environment of its own process: a child is started through `env(1)`, which adds the variables to it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SETTINGS: Mapping[str, str] = {
    "JAX_PLATFORMS": "cpu",  # the plugin would look for a GPU, or take the memory of one that is there
    # Both on standard output:
    "MOSAIC_GPU_DUMP_PTX": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
}
_PUT_FIRST_ON_PATH = 'PATH="$1:$PATH"; export PATH; shift; exec "$@"'

# Module that must be there -> the packages that bring it.
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "jax_plugins.xla_cuda13": ("jax-cuda13-pjrt",),
    "jax_cuda13_plugin": ("jax-cuda13-plugin",),
    "nvidia.cu13": ("nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm"),
    "absl": ("absl-py",),
}


class AotUnavailableError(RuntimeError):
    """Nothing can be compiled ahead of time in this process."""


def missing_packages() -> tuple[str, ...]:
    """Packages without which nothing can be compiled for a GPU here."""
    return tuple(name for module, names in _PACKAGES.items() if not _is_there(module) for name in names)


def require_packages() -> None:
    """Refuse to go on without the packages.

    Raises:
        AotUnavailableError: some are missing.
    """
    missing = missing_packages()
    if missing:
        raise AotUnavailableError(
            f"compiling for a GPU that is not there needs {', '.join(missing)}: install 'quire-llm[aot]' into an "
            "environment of its own (`make test-kernels` makes one in .venv-aot)"
        )


def tools() -> Path:
    """The directory of ptxas and nvdisasm.

    Raises:
        AotUnavailableError: packages are missing.
    """
    require_packages()
    spec = importlib.util.find_spec("nvidia.cu13")
    folders = [Path(folder) / "bin" for folder in (spec.submodule_search_locations or () if spec else ())]
    return next(folder for folder in folders if (folder / "ptxas").is_file())


def run_launched(command: Sequence[str]) -> int:
    """Run a command in the environment that `compile_for` needs; returns its exit status.

    Raises:
        AotUnavailableError: packages are missing.
    """
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    # Mosaic GPU takes the first ptxas of the PATH, whatever its version.
    shell = ["sh", "-c", _PUT_FIRST_ON_PATH, "sh", str(tools())]
    return subprocess.run([*shell, "env", *settings, *command], check=False).returncode


def relaunch(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` in the environment that `compile_for` needs; returns its exit status.

    Raises:
        AotUnavailableError: packages are missing.
    """
    return run_launched([sys.executable, "-m", module, *arguments])


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
