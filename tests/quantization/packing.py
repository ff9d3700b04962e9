"""Quantized checkpoints that tests write for themselves, by the formats' specifications and with numpy alone.

A second opinion on `models/quantization`: one Python loop or one index for each number, no shared code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models.layers.product import MixedWeight, Weight
from pallas_kernels.quantized_matmul import QuantizedWeight, dequantize
from tests.models.tiny_checkpoints import expected_parameters, random_tensors, tiny_config, write_checkpoint

# Every matrix has its own sizes; inputs are 64 and 96, so that groups of 32 fit and of 64 are short in one of them.
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip

Quantize = Callable[[str, tuple[int, int], np.random.Generator], tuple[dict[str, np.ndarray], np.ndarray] | None]
"""(module, (N, K), random numbers) -> the tensors it is stored as, by suffix, and its values float64[N, K]; None if it
stays plain."""


def pack_stream(numbers: np.ndarray, bits: int) -> np.ndarray:
    """int32[..., words] of unsigned numbers [..., count]: a little-endian bit stream, bit by bit."""
    ones = (numbers[..., None] >> np.arange(bits)) & 1
    stream = ones.reshape(*numbers.shape[:-1], -1).astype(np.uint8)
    short = -stream.shape[-1] % 32
    stream = np.concatenate([stream, np.zeros((*stream.shape[:-1], short), np.uint8)], axis=-1)
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


def pack_awq(numbers: np.ndarray) -> np.ndarray:
    """int32[rows, outputs / 8] of unsigned 4-bit numbers [rows, outputs], in AWQ's order."""
    words = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for place, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, word] |= numbers[:, 8 * word + output].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def write_quantized(
    directory: Path,
    quantization_config: dict[str, Any] | None,
    quantize: Quantize,
    *,
    seed: int = 0,
    **changes: Any,
) -> dict[str, np.ndarray]:
    """Write a tiny checkpoint whose matrices are stored as `quantize` says.

    Returns:
        The values of every tensor of its plain twin.
    """
    raw = tiny_config(**(SIZES | changes))
    tensors, rng = random_tensors(raw, seed), np.random.default_rng(seed)
    values = dict(tensors)
    for name in sorted(tensors):
        module = name.removesuffix(".weight")
        if module == name or "proj" not in module and module != "lm_head":
            continue
        made = quantize(module, tensors[name].shape, rng)
        if made is not None:
            stored, values[name] = made
            del tensors[name]
            tensors |= {f"{module}.{suffix}": np.ascontiguousarray(array) for suffix, array in stored.items()}
    if quantization_config is not None:
        raw = raw | {"quantization_config": quantization_config}
    write_checkpoint(directory, raw, tensors)
    return values


def dense(weight: Weight) -> np.ndarray:
    """float32[in, out] of a weight on the device."""
    if isinstance(weight, MixedWeight):
        return np.concatenate([dense(part) for part in weight.parts], axis=1)
    if isinstance(weight, QuantizedWeight):
        return np.asarray(dequantize(weight)).T
    return np.asarray(weight.astype(np.float32))


def require_values(params: dict[str, Weight], values: dict[str, np.ndarray], num_layers: int = 2) -> None:
    """Every parameter holds exactly the float32 nearest to its values; `values` as `write_quantized` gives them."""
    expected = expected_parameters(values, num_layers, tied=False)
    assert params.keys() == expected.keys()
    for name, weight in params.items():
        found = dense(weight)
        if name == "head.weight" and isinstance(weight, QuantizedWeight):
            found = found.T
        np.testing.assert_array_equal(found, expected[name].astype(np.float32), err_msg=name)
