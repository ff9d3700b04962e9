"""`TensorSource`: what a checkpoint must be able to say, whatever its file format."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np

Progress = Callable[[int, int, str], None]
"""Called after each parameter with (bytes done, bytes in total, name of the parameter); bytes as served, of packed
parameters as stored in the checkpoint."""


class TensorSource(Protocol):
    """A checkpoint with Hugging Face's tensor names and layouts: projections are `[out, in]`."""

    def names(self) -> Collection[str]:
        """Every tensor of the checkpoint."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        ...

    def dtype(self, name: str) -> str:
        """Name of the dtype in which `read` gives it, as numpy or ml_dtypes call it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, C-contiguous; may be a view of a mapped file.

        Raises:
            WeightsError: the tensor cannot be read.
        """
        ...
