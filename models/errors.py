"""Faults of models and their files: what `models` raises. `engine/errors.py` re-exports these beside its own."""

from __future__ import annotations


class QuireError(Exception):
    """Base of all errors that Quire raises on purpose."""


class ModelNotFoundError(QuireError, FileNotFoundError):
    """A model reference resolves to nothing: no directory, no file, no hub repository."""


class UnsupportedModelError(QuireError, ValueError):
    """The architecture, a config value or a quantization method is recognised but not supported, or not recognised."""


class WeightsError(QuireError, ValueError):
    """Weights are missing, extra, misshapen, truncated or corrupted. The message names tensor, expected and found."""


class CacheWriteError(QuireError, OSError):
    """A download cannot be kept: the disk is full, or the cache directory is not writable."""
