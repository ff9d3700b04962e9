"""The dtypes that weights may be served in, by name."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from models.config import ModelConfig
from models.errors import UnsupportedModelError

SERVING_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def resolve_dtype(dtype: str, config: ModelConfig) -> np.dtype:
    """The dtype to serve in; "auto" is the checkpoint's own.

    Raises:
        UnsupportedModelError: no such dtype.
    """
    name = config.dtype if dtype == "auto" else dtype
    if name not in SERVING_DTYPES:
        raise UnsupportedModelError(
            f"dtype {name!r} is not supported; supported are auto, {', '.join(SERVING_DTYPES)}."
        )
    return SERVING_DTYPES[name]
