"""Environments of peers, with a pip that installs nothing."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.compare import environments
from benchmarks.compare.environments import (
    ENVIRONMENTS,
    PeerEnvironment,
    PeerEnvironmentError,
    clean_process_environment,
    find_python,
    make,
    peer_python,
    python_version,
)

THIS = f"{sys.version_info.major}.{sys.version_info.minor}"
TOY = PeerEnvironment("toy", THIS, (("first==1",), ("second==2", "third==3")))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would be run; `-m venv` leaves an interpreter behind."""
    run: list[list[str]] = []

    def pretend(command: Sequence[str], environment: PeerEnvironment) -> None:
        run.append(list(command))
        if "venv" in command:
            (environment.directory / "bin").mkdir(parents=True)
            (environment.directory / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(environments, "HERE", tmp_path)
    monkeypatch.setattr(environments, "_run", pretend)
    monkeypatch.setattr(environments, "find_python", lambda version: sys.executable)
    return run


def test_it_is_made_once(commands: list[list[str]], tmp_path: Path) -> None:
    python = make(TOY)
    assert python == tmp_path / ".venv-toy" / "bin" / "python"
    assert [command[-len(install) :] for command, install in zip(commands[1:], TOY.installs, strict=True)] == [
        ["first==1"],
        ["second==2", "third==3"],
    ]
    commands.clear()
    assert make(TOY) == python and commands == []


def test_exact_requirements_and_builds_come_last(commands: list[list[str]], tmp_path: Path) -> None:
    python = make(PeerEnvironment("toy-2", THIS, (("first==1",),), exact=("second==2",), builds=("third==3",)))
    assert commands[1][-1] == "first==1" and "--no-deps" not in commands[1]
    assert commands[2][-2:] == ["--no-deps", "second==2"]
    assert commands[3] == [str(python), str(tmp_path / "build_toy_2.py"), "third==3"]
    assert (python.parents[1] / "quire-requirements.txt").read_text() == "first==1\nsecond==2\nthird==3\n"


def test_other_requirements_make_it_anew(commands: list[list[str]]) -> None:
    make(TOY)
    commands.clear()
    make(PeerEnvironment("toy", THIS, (("first==2",),)))
    assert len(commands) == 2


def test_a_half_made_one_is_made_anew(commands: list[list[str]], tmp_path: Path) -> None:
    make(TOY)
    (tmp_path / ".venv-toy" / "quire-requirements.txt").unlink()
    commands.clear()
    make(TOY)
    assert len(commands) == 3


def test_a_failing_pip_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "HERE", tmp_path)
    monkeypatch.setattr(environments, "find_python", lambda version: "false")
    with pytest.raises(PeerEnvironmentError, match="--env-toy"):
        make(TOY)


def test_an_interpreter_of_the_users_is_taken_as_it_is() -> None:
    assert peer_python("transformers", sys.executable) == Path(sys.executable)
    assert peer_python("") == Path(sys.executable)
    with pytest.raises(PeerEnvironmentError, match="--env-transformers: nowhere/python"):
        peer_python("transformers", "nowhere/python")


def test_finding_a_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "_candidates", lambda version: ["nowhere", sys.executable])
    assert find_python(THIS) == sys.executable
    with pytest.raises(PeerEnvironmentError, match="no Python 2.7 was found"):
        find_python("2.7")
    assert python_version("nowhere") is None


def test_every_requirement_is_pinned() -> None:
    for environment in ENVIRONMENTS.values():
        assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", requirement) for requirement in environment.requirements)
        for requirement in environment.builds:
            assert (environments.HERE / f"build_{environment.name.replace('-', '_')}.py").is_file(), requirement


def test_another_environment_does_not_see_our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "ours")
    monkeypatch.setenv("SOMETHING", "kept")
    cleaned = clean_process_environment({"EXTRA": "1"})
    assert "PYTHONPATH" not in cleaned
    assert cleaned["SOMETHING"] == "kept" and cleaned["EXTRA"] == "1"
