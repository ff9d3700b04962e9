"""Tests that compile for a GPU that is not there. Run by `make test-kernels`, in an environment of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pallas_kernels.aot import SETTINGS, missing_packages


def _reason() -> str | None:
    missing = missing_packages()
    if missing:
        return f"needs {', '.join(missing)} (`make test-kernels` installs them into .venv-aot)"
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        return "start with `python -m pallas_kernels.aot run pytest tests/aot`: the compilers would say nothing"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder's tests where they cannot run, and say why."""
    reason = _reason()
    for item in items:
        if reason and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason=reason))
