"""How much of a GPU's memory an engine may use; what needs no GPU to be tested."""

from __future__ import annotations

import pytest

from engine import config
from engine.config import reserve_gpu_memory
from engine.runtime.memory import gpu_memory_limit

NAME, OLD_NAME = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (NAME, OLD_NAME):
        monkeypatch.setenv(name, "")


def test_the_engine_says_how_much_jax_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_jax_has_devices", lambda: False)
    assert reserve_gpu_memory(0.92) == 0.92
    assert config.os.environ[NAME] == "0.92"
    assert reserve_gpu_memory(0.5) == 0.92, "a second engine finds what the first one took"


@pytest.mark.parametrize("name", [NAME, OLD_NAME])
def test_the_user_goes_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_jax_has_devices", lambda: False)
    monkeypatch.setenv(name, "0.4")
    assert reserve_gpu_memory(0.92) == 0.4


def test_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that used JAX before has taken its 75 %, and a variable would change nothing but mislead."""
    monkeypatch.setattr(config, "_jax_has_devices", lambda: True)
    assert reserve_gpu_memory(0.92) == 0.75
    assert not config.os.environ[NAME]


def test_limit_is_of_the_whole_memory_and_never_beyond_the_allocator() -> None:
    assert gpu_memory_limit(920, 0.92, 0.92) == 920
    assert gpu_memory_limit(920, 0.46, 0.92) == 460
    assert gpu_memory_limit(750, 0.92, 0.75) == 750
