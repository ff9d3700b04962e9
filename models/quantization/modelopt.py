"""Checkpoints of NVIDIA's Model Optimizer: `quant_method: modelopt`, or `hf_quant_config.json` beside the config.

    FP8                         weight e4m3[N, K], weight_scale [], input_scale []
    FP8_PER_CHANNEL_PER_TOKEN   weight e4m3[N, K], weight_scale [N]
    FP8_PB_WO                   weight e4m3[N, K], weight_scale [ceil(N/128), 1, ceil(K/128), 1]; weights only
    NVFP4, W4A16_NVFP4          weight uint8[N, K/2] of e2m1, weight_scale e4m3[N, K/16], weight_scale_2 []
    MXFP8                       weight e4m3[N, K], weight_scale uint8[N, K/32] in e8m0
    MIXED_PRECISION             one of these for each module that `quantized_layers` names

NVFP4's and MXFP8's matrices are dequantized at load, and their activations are not quantized. value[n, k] of NVFP4 is
number[n, k] * (weight_scale[n, k // 16] * weight_scale_2).

Source: Model Optimizer's files, and what vLLM's loader expects of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.errors import WeightsError
from models.families.fields import RawConfig, integer, refuse, strings, table, text
from models.families.tensors import SourceTensor
from models.layers.product import Matrix
from models.loading.source import TensorSource
from models.quantization.floats import E4M3, from_e2m1, from_e8m0, scaled_dense, usable_scales
from models.quantization.format import module_of
from models.quantization.fp8 import Layout, explains_scale, is_e4m3
from models.quantization.modules import Excluded

_FP8 = {
    "FP8": Layout("tensor", activations="either"),
    "FP8_PER_CHANNEL_PER_TOKEN": Layout("output"),
    "FP8_PB_WO": Layout("block", (128, 128), kind="w8a16_fp8"),
}
_NVFP4 = ("NVFP4", "W4A16_NVFP4")
_MXFP8 = "MXFP8"
_MIXED = "MIXED_PRECISION"
ALGORITHMS = (*_FP8, *_NVFP4, _MXFP8)
_MXFP8_GROUP, _NVFP4_GROUP = 32, 16
_CACHE_KEYS = ("kv_cache_quant_algo", "kv_cache_scheme")  # of a model whose weights may be plain


@dataclass(frozen=True)
class Rule:
    """How one module is stored.

    Attributes:
        algorithm: one of `ALGORITHMS`.
        group_size: inputs that share a scale, of NVFP4.
    """

    algorithm: str
    group_size: int = _NVFP4_GROUP

    def is_there(self, matrix: SourceTensor, source: TensorSource) -> bool:
        """Whether the checkpoint holds a matrix so, rather than plain."""
        if self.algorithm in _NVFP4:
            return matrix.name in source.names() and source.dtype(matrix.name) == "uint8"
        return is_e4m3(matrix.name, source)

    def stored(self, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor]:
        """Role -> tensor, see `WeightFormat`."""
        if self.algorithm in _FP8:
            return _FP8[self.algorithm].stored(matrix, source)
        n, k = matrix.shape
        if self.algorithm == _MXFP8:
            scales = SourceTensor(f"{matrix.name}_scale", (n, -(-k // _MXFP8_GROUP)), ("uint8",))
            return {"weight": replace(matrix, dtypes=(E4M3,)), "scales": scales}
        scale_2 = f"{matrix.name}_scale_2"
        shape = tuple(source.shape(scale_2)) if scale_2 in source.names() else ()
        return {
            "weight": SourceTensor(matrix.name, (n, -(-k // 2)), ("uint8",)),
            "scales": SourceTensor(f"{matrix.name}_scale", (n, -(-k // self.group_size)), (E4M3,)),
            "scale_2": SourceTensor(scale_2, shape if shape == (1,) else (), ("float32",)),
        }

    def pack(self, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
        """See `WeightFormat`."""
        if self.algorithm in _FP8:
            return _FP8[self.algorithm].pack(tensors, dtype)
        if self.algorithm == _MXFP8:
            numbers, scales, size = tensors["weight"].astype(np.float32), from_e8m0(tensors["scales"]), _MXFP8_GROUP
        else:
            numbers, size = from_e2m1(tensors["weight"]), self.group_size
            scales = usable_scales(tensors["scales"]) * usable_scales(tensors["scale_2"]).reshape(())
        if np.isnan(numbers).any():
            raise WeightsError("it holds numbers that are NaN.")
        return scaled_dense(jnp.asarray(numbers), jnp.asarray(scales), size, dtype)


@dataclass(frozen=True)
class ModelOpt:
    """The `WeightFormat`.

    Attributes:
        name: for logs and errors.
        rule: of modules that `rules` does not name; None = plain.
        rules: module -> how it is stored.
        excluded: modules that must be plain.
    """

    name: str
    rule: Rule | None
    rules: Mapping[str, Rule]
    excluded: Excluded

    def rule_of(self, module: str) -> Rule | None:
        """How a module is stored; None = plain."""
        return None if module in self.excluded else self.rules.get(module, self.rule)

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """See `WeightFormat`. A module that no list excludes may be plain all the same, as heads are."""
        rule = self.rule_of(module_of(matrix))
        return rule.stored(matrix, source) if rule is not None and rule.is_there(matrix, source) else None

    def pack(self, matrix: SourceTensor, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
        """See `WeightFormat`."""
        rule = self.rule_of(module_of(matrix))
        assert rule is not None  # nothing is stored without one
        return rule.pack(tensors, dtype)

    def explains(self, name: str) -> bool:
        """See `WeightFormat`."""
        return explains_scale(name)


def parse_modelopt(raw: RawConfig) -> ModelOpt:
    """The format that a `quantization_config` with `quant_method: modelopt`, or a `hf_quant_config.json`, describes.

    Raises:
        UnsupportedModelError: a value that is not supported.
    """
    inner = table(raw, "quantization") or raw
    only_cache = inner.get("quant_algo") is None and any(inner.get(key) for key in _CACHE_KEYS)
    algorithm = _MIXED if only_cache else _algorithm(inner, "quant_algo")
    rules: dict[str, Rule] = {}
    for module, given in table(inner, "quantized_layers").items():
        if not isinstance(given, dict):
            refuse(f"quantization_config.quantized_layers[{module!r}]", given, "an object")
        rules[module] = _rule(given, f"quantized_layers[{module!r}].quant_algo")
    excluded = Excluded((*(strings(inner, "exclude_modules") or ()), *(strings(inner, "ignore") or ())))
    if algorithm == _MIXED:
        return ModelOpt("modelopt", None, rules, excluded)
    return ModelOpt(f"modelopt {algorithm}", _rule(inner, "quant_algo"), rules, excluded)


def _rule(raw: RawConfig, where: str) -> Rule:
    algorithm = _algorithm(raw, where)
    if algorithm == _MIXED:
        refuse(f"quantization_config.{where}", algorithm, ", ".join(ALGORITHMS))
    return Rule(algorithm, integer(raw, "group_size", _NVFP4_GROUP) if algorithm in _NVFP4 else _NVFP4_GROUP)


def _algorithm(raw: Mapping[str, Any], where: str) -> str:
    algorithm = text(raw, "quant_algo", "").upper()
    if algorithm not in (*ALGORITHMS, _MIXED):
        refuse(f"quantization_config.{where}", raw.get("quant_algo"), f"{', '.join(ALGORITHMS)} or {_MIXED}")
    return algorithm
