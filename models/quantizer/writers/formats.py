"""One function a format: (module, matrix) -> tensors; and its `quantization_config`.

What is written is read back by `models.quantization`, and by transformers and vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from models.quantization.gptq import ONES
from models.quantizer.types import FP8_BLOCK, FloatMatrix, QuantizedMatrix, Settings

Tensors = dict[str, np.ndarray]
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs of a word, the lowest nibble first
_HEAD = ["lm_head"]


def pack_stream(numbers: np.ndarray, bits: int) -> np.ndarray:
    """int32[..., words] of unsigned numbers [..., count]: the little-endian bit stream of `models.quantization`."""
    count = numbers.shape[-1]
    stream = np.unpackbits(numbers.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    stream = stream.reshape(*numbers.shape[:-1], count * bits)
    stream = np.pad(stream, [(0, 0)] * (numbers.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


def gptq(module: str, matrix: QuantizedMatrix, dtype: np.dtype) -> Tensors:
    """Version 1: zero points minus one; where one is 0 the word borrows from its neighbour, which readers undo."""
    if matrix.bits in ONES:
        zeros = pack_stream(matrix.zeros.T, matrix.bits).view(np.uint32) - np.uint32(ONES[matrix.bits])
    else:
        zeros = pack_stream((matrix.zeros.T - 1) & ((1 << matrix.bits) - 1), matrix.bits)
    return {
        f"{module}.qweight": np.ascontiguousarray(pack_stream(matrix.codes, matrix.bits).T),
        f"{module}.qzeros": zeros.view(np.int32),
        f"{module}.scales": np.ascontiguousarray(matrix.scales.T.astype(np.float16)),
        f"{module}.g_idx": matrix.groups.astype(np.int32),
    }


def gptq_config(settings: Settings) -> dict[str, Any]:
    """Of `quant_method: gptq`."""
    return {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "sym": settings.sym,
        "desc_act": settings.act_order,
        "true_sequential": True,
        "damp_percent": settings.damp,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }


def awq(module: str, matrix: QuantizedMatrix, dtype: np.dtype) -> Tensors:
    """Version gemm."""
    return {
        f"{module}.qweight": _pack_awq(matrix.codes.T),
        f"{module}.qzeros": _pack_awq(matrix.zeros.T),
        f"{module}.scales": np.ascontiguousarray(matrix.scales.T.astype(np.float16)),
    }


def _pack_awq(numbers: np.ndarray) -> np.ndarray:
    """int32[R, N / 8] of unsigned [R, N]."""
    nibbles = numbers.astype(np.uint32).reshape(len(numbers), -1, 8)[..., list(_AWQ_ORDER)]
    return (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.int32)


def awq_config(settings: Settings) -> dict[str, Any]:
    """Of `quant_method: awq`."""
    return {
        "quant_method": "awq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _HEAD,
    }


def compressed_tensors(module: str, matrix: QuantizedMatrix, dtype: np.dtype) -> Tensors:
    """pack-quantized."""
    tensors = {
        f"{module}.weight_packed": pack_stream(matrix.codes, matrix.bits),
        f"{module}.weight_scale": matrix.scales.astype(dtype),
        f"{module}.weight_shape": np.array(matrix.codes.shape, np.int64),
    }
    if matrix.has_zeros:
        tensors[f"{module}.weight_zero_point"] = np.ascontiguousarray(pack_stream(matrix.zeros.T, matrix.bits).T)
    return tensors


def compressed_tensors_config(settings: Settings) -> dict[str, Any]:
    """Of `quant_method: compressed-tensors`."""
    weights = {
        "num_bits": settings.bits,
        "type": "int",
        "symmetric": settings.sym,
        "strategy": "channel" if settings.group_size < 0 else "group",
        "group_size": None if settings.group_size < 0 else settings.group_size,
        "dynamic": False,
        "actorder": "static" if settings.act_order else None,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": _HEAD,
        "kv_cache_scheme": None,
    }


def fp8(module: str, matrix: FloatMatrix, dtype: np.dtype) -> Tensors:
    """e4m3 with a scale for each block of 128x128."""
    return {
        f"{module}.weight": matrix.numbers.astype(ml_dtypes.float8_e4m3fn),
        f"{module}.weight_scale_inv": matrix.scales,
    }


def fp8_config(settings: Settings) -> dict[str, Any]:
    """Of `quant_method: fp8`."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": _HEAD,
    }


# A format's writer takes what methods make for it: `FloatMatrix` for fp8, `QuantizedMatrix` for the others.
WRITERS: Mapping[str, Callable[[str, Any, np.dtype], Tensors]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
}
CONFIGS: Mapping[str, Callable[[Settings], dict[str, Any]]] = {
    "gptq": gptq_config,
    "awq": awq_config,
    "compressed-tensors": compressed_tensors_config,
    "fp8": fp8_config,
}
