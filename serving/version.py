"""The version of the installed distribution."""

from __future__ import annotations

import importlib.metadata


def package_version() -> str:
    """The version of the installed distribution."""
    try:
        return importlib.metadata.version("quire-llm")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: run from its source folder)"
