"""Writes what `quire quantize` makes of the tiny golden llama, for other tools to read; `check.py` has them read it.

    .venv/bin/python -m tests.quantizer.round_trip.make FOLDER

Each folder in FOLDER is a checkpoint. `logits.npz` beside its files holds what Quire computes with it, activations
float32: `logits`, and, where activations are rounded at run time, `unrounded` with the values of the weights alone.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.layers.product import MixedWeight, Weight
from models.loading.load import LoadedModel, load_model
from models.quantizer.evaluate import predict
from models.quantizer.job import quantize_model
from models.quantizer.types import Settings
from pallas_kernels.quantized_matmul import QuantizedWeight, dequantize

SOURCE = Path(__file__).parents[2] / "golden" / "tiny" / "llama"
MADE: dict[str, dict[str, Any]] = {
    "gptq-2": {"format": "gptq", "method": "rtn", "bits": 2},
    "gptq-3": {"format": "gptq", "method": "rtn", "bits": 3},
    "gptq-4-asym": {"format": "gptq", "method": "gptq", "sym": False},
    "gptq-4-order": {"format": "gptq", "method": "gptq", "act_order": True},
    "gptq-4-autoround": {"format": "gptq", "method": "autoround", "steps": 10},
    "gptq-8": {"format": "gptq", "method": "rtn", "bits": 8, "group_size": -1},
    "awq-4-asym": {"format": "awq", "method": "awq", "sym": False},
    "compressed-tensors-3-asym": {"format": "compressed-tensors", "method": "rtn", "bits": 3, "sym": False},
    "compressed-tensors-4": {"format": "compressed-tensors", "method": "rtn"},
    "compressed-tensors-4-asym-order": {
        "format": "compressed-tensors",
        "method": "gptq",
        "sym": False,
        "act_order": True,
    },
    "compressed-tensors-8": {"format": "compressed-tensors", "method": "rtn", "bits": 8, "group_size": -1},
    "fp8": {"format": "fp8", "method": "rtn", "bits": 8},
}


def _dense(weight: Weight) -> Weight:
    if isinstance(weight, MixedWeight):
        return jnp.concatenate([jnp.asarray(_dense(part)) for part in weight.parts], axis=1)
    return dequantize(weight).T if isinstance(weight, QuantizedWeight) else weight


def _logits(model: LoadedModel, params: dict[str, Weight], windows: np.ndarray) -> np.ndarray:
    found = predict(model.config, params, windows)
    return np.asarray(found.hidden @ np.asarray(found.table).T)


def main(folder: Path) -> None:
    """Write everything."""
    windows = np.random.default_rng(0).integers(3, 320, (4, 48)).astype(np.int32)
    for name, settings in MADE.items():
        out = folder / name
        shutil.rmtree(out, ignore_errors=True)
        quantize_model(SOURCE, out, Settings(**{"group_size": 32} | settings), windows)
        model = load_model(out, dtype="float32")
        made = {"windows": windows, "logits": _logits(model, model.params, windows)}
        if settings["format"] == "fp8":
            made["unrounded"] = _logits(model, {key: _dense(each) for key, each in model.params.items()}, windows)
        np.savez(out / "logits.npz", **made)
        print(name, model.quantization)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
