"""Which `WeightFormat` a quantized checkpoint is in, as its config says. A new one is one file and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from models.errors import UnsupportedModelError
from models.families.fields import RawConfig, table, text
from models.quantization.auto_round import NAMES, delegated, parse_auto_round
from models.quantization.awq import parse_awq
from models.quantization.compressed_tensors import kv_cache_dtype_of, parse_compressed_tensors
from models.quantization.format import WeightFormat
from models.quantization.fp8 import parse_fbgemm, parse_fp8
from models.quantization.gptq import parse_gptq
from models.quantization.modelopt import parse_modelopt
from models.quantization.mxfp4 import parse_mxfp4

METHODS: Mapping[str, Callable[[RawConfig], WeightFormat]] = {
    "gptq": parse_gptq,
    "awq": parse_awq,
    **dict.fromkeys(NAMES, parse_auto_round),
    "compressed-tensors": parse_compressed_tensors,
    "fp8": parse_fp8,
    "fbgemm_fp8": parse_fbgemm,
    "modelopt": parse_modelopt,
    "modelopt_fp4": parse_modelopt,
    "modelopt_mxfp8": parse_modelopt,
    "modelopt_mixed": parse_modelopt,
    "mxfp4": parse_mxfp4,
}
# Recognised, and refused for what they are.
UNSUPPORTED: Mapping[str, str] = {
    "aqlm": "codebooks of whole vectors (AQLM)",
    "bitnet": "ternary weights (BitNet)",
    "bitsandbytes": "bitsandbytes' 4-bit floats or LLM.int8",
    "eetq": "EETQ's own order of int8",
    "fouroversix": "NVFP4 with two ranges of scales",
    "fp_quant": "FP-Quant's rotated weights",
    "higgs": "HIGGS grids and rotated weights",
    "hqq": "HQQ's own packing",
    "metal": "weights packed for Apple's Metal",
    "quanto": "quanto's own packing",
    "quark": "AMD Quark's formats",
    "sinq": "SINQ's two axes of scales",
    "spqr": "SpQR's sparse outliers",
    "torchao": "torchao's tensor classes",
    "vptq": "codebooks of whole vectors (VPTQ)",
}
_CONFIG_KEYS = ("quantization_config", "compression_config")
# Files beside config.json that older tools put the same object into, and the method that each stands for.
_SIDE_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "quanto",
}


def checkpoint_format(raw: RawConfig, side_file: Callable[[str], RawConfig | None]) -> WeightFormat | None:
    """The format of a checkpoint's matrices; None if they are plain.

    Args:
        raw: `config.json`.
        side_file: (name) -> a JSON file beside it, None if there is none.

    Raises:
        UnsupportedModelError: the method or one of its options is not supported; says what is.
    """
    for key in _CONFIG_KEYS:
        found = table(raw, key)
        if found:
            return _parse(found, text(found, "quant_method", ""))
    for name, method in _SIDE_FILES.items():
        found = side_file(name)
        if found:
            return _parse(found, text(found, "quant_method", method))
    return None


def _parse(found: RawConfig, method: str) -> WeightFormat:
    found, method = delegated(found, method)
    if method not in METHODS:
        what = f"quantized by {method!r}" if method else "quantized by a method that it does not name"
        if method in UNSUPPORTED:
            what += f" ({UNSUPPORTED[method]})"
        raise UnsupportedModelError(
            f"This checkpoint is {what}, which is not supported; supported are {', '.join(METHODS)}. Use one of those, "
            "the model's original checkpoint, or a GGUF file."
        )
    return METHODS[method](found)


def kv_cache_dtype(raw: RawConfig) -> str | None:
    """In which dtype a checkpoint wants keys and values to be kept; None if it does not say.

    Its scales are not needed: the cache has one for each token and head, of what is written there.

    Raises:
        UnsupportedModelError: one that there is no cache of.
    """
    for key in _CONFIG_KEYS:
        found = table(raw, key)
        if found:
            return kv_cache_dtype_of(found)
    return None
