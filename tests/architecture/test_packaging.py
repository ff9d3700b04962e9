"""The files at the root: the package's description, and how an environment is found and made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.architecture.rules import LAYERS

ROOT = Path(__file__).resolve().parents[2]
FIND_PYTHON = ROOT / ".ci" / "find-python"
BROKEN_SHIM = "#!/bin/sh\necho 'python3.12: command not found' >&2\nexit 127\n"


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def find_python(bin_dir: Path, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the finder with nothing but `bin_dir` on the PATH."""
    return subprocess.run(
        ["/bin/sh", str(FIND_PYTHON)],
        env={"PATH": str(bin_dir), "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def this_python(path: Path) -> Path:
    return put(path, f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')


def test_the_finder_passes_over_a_shim_that_fails(tmp_path: Path) -> None:
    put(tmp_path / "bin" / "python3.12", BROKEN_SHIM)
    this_python(tmp_path / "bin" / "python3")
    result = find_python(tmp_path / "bin", tmp_path)
    assert result.returncode == 0 and Path(result.stdout.strip()).exists()


def test_the_finder_looks_into_pyenv(tmp_path: Path) -> None:
    put(tmp_path / "bin" / "python3.12", BROKEN_SHIM)
    this_python(tmp_path / "home" / ".pyenv" / "versions" / "3.12.9" / "bin" / "python")
    result = find_python(tmp_path / "bin", tmp_path / "home")
    assert result.returncode == 0 and Path(result.stdout.strip()).exists()


def test_an_old_python_is_not_taken_when_named(tmp_path: Path) -> None:
    old = put(tmp_path / "bin" / "python3", "#!/bin/sh\nexit 1\n")
    result = find_python(tmp_path / "bin", tmp_path, PYTHON=str(old))
    assert result.returncode == 1
    assert f"PYTHON={old} is not a Python 3.12 or newer" in result.stderr


@pytest.mark.skipif(any(Path("/usr/local/bin").glob("python3.1[2-9]")), reason="a Python is found at a fixed place")
def test_without_any_python_there_is_one_line_of_advice(tmp_path: Path) -> None:
    result = find_python(tmp_path / "bin", tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("Quire needs Python 3.12 or newer") and result.stderr.count("\n") == 1


def test_the_wheel_holds_all_packages(project: dict) -> None:
    assert tuple(sorted(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])) == tuple(sorted(LAYERS))
    assert project["project"]["scripts"] == {"quire": "serving.cli:main"}


def test_data_files_of_the_kernels_are_no_ones_to_ignore() -> None:
    """The wheel takes what git does not ignore."""
    files = ["pallas_kernels/targets/nvidia_h200.txtpb", "pallas_kernels/tuned/nvidia_h200/paged_attention.json"]
    result = subprocess.run(["git", "check-ignore", "--no-index", *files], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, f"ignored: {result.stdout}"


def test_pinned_versions_are_plain_pins_without_addresses(project: dict) -> None:
    lines = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+", pin) for pin in pins)
    names = {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}
    extras = project["project"]["optional-dependencies"]
    asked = project["project"]["dependencies"] + extras["dev"] + extras["bench"] + extras["otel"]
    wanted = {re.split(r"[\[<>=~! ]", line, maxsplit=1)[0].lower().replace("_", "-") for line in asked}
    assert wanted - {project["project"]["name"]} <= names


def test_make_lists_its_targets_without_an_environment() -> None:
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    result = subprocess.run(["make"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for target in (
        "setup",
        "demo",
        "test",
        "test-all",
        "test-kernels",
        "aot-table",
        "lint",
        "format",
        "bench",
        "clean",
    ):
        assert f"  make {target} " in result.stdout
