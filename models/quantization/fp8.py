"""Checkpoints of 8-bit floats: `quant_method: fp8` and `fbgemm_fp8`, and the same layouts under other names (ModelOpt).

    weight            e4m3[N, K]
    weight_scale_inv  a scale for each block of 128x128 (`weight_block_size`): [ceil(N/128), ceil(K/128)]
    weight_scale      without blocks: one for the matrix, [] or [1]; of fbgemm one for each output, [N, 1]
    input_scale       [] or [1], with `activation_scheme: static`

    value[n, k] = number[n, k] * scale          "_inv" says the same: it is what quantizing divided by

Writers mix the names up ("weight_scale_inv" without blocks, "scale" with them, "activation_scale"): all are known, and
shapes must be those that the config asks for.

Sources: DeepSeek-AI 2024 (arXiv 2412.19437, section 3.3) for blocks; files of DeepSeek-V3, Qwen3, Ministral, AutoFP8
and Llama-3.1-405B-FP8 for names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np

from models.errors import WeightsError
from models.families.fields import RawConfig, number, refuse, strings, text
from models.families.tensors import SourceTensor
from models.layers.product import Matrix
from models.loading.source import TensorSource
from models.quantization.floats import E4M3, SCALES, is_cache_scale, pack_e4m3
from models.quantization.format import module_of
from models.quantization.modules import Excluded
from pallas_kernels.quantized_matmul import QuantizedWeight, with_static_activations

_WEIGHT_SCALES = ("weight_scale_inv", "weight_scale", "scale")
_INPUT_SCALES = ("input_scale", "activation_scale")
_FBGEMM_LIMIT = 1200.0


@dataclass(frozen=True)
class Layout:
    """How modules are stored and met.

    Attributes:
        per: what a scale belongs to: "tensor", "output" or "block".
        block: (outputs, inputs) of a block.
        kind: key of `pallas_kernels.quantized_matmul.KINDS`.
        activations: "dynamic", "static", or "either": by a scale measured beforehand if there is one.
        input_limit: largest magnitude of activations that are quantized; None = no limit.
    """

    per: str
    block: tuple[int, int] = (1, -1)
    kind: str = "w8a8_fp8"
    activations: str = "dynamic"
    input_limit: float | None = None

    def scale_shapes(self, n: int, k: int) -> tuple[tuple[int, ...], ...]:
        """That scales of an `[N, K]` matrix may have, the usual one first."""
        if self.per == "tensor":
            return ((), (1,), (1, 1))
        if self.per == "output":
            return ((n, 1), (n,))
        rows, groups = -(-n // self.block[0]), -(-k // self.block[1])
        return ((rows, groups), (rows, 1, groups, 1))

    def stored(self, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor]:
        """Role -> tensor, see `WeightFormat`."""
        module, names = module_of(matrix), source.names()
        scale = _first(
            module, _WEIGHT_SCALES if self.per == "block" else (*_WEIGHT_SCALES[1:], _WEIGHT_SCALES[0]), names
        )
        tensors = {
            "weight": replace(matrix, dtypes=(E4M3,)),
            "scales": _shaped(scale, self.scale_shapes(*matrix.shape), SCALES, source),
        }
        measured = _first(module, _INPUT_SCALES, names)
        if self.activations == "static" or (self.activations == "either" and measured in names):
            tensors["input_scale"] = _shaped(measured, ((), (1,)), SCALES, source)
        return tensors

    def pack(self, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
        """See `WeightFormat`."""
        scales = tensors["scales"]
        if self.per == "block":
            scales = scales.reshape(-(-tensors["weight"].shape[0] // self.block[0]), -1)
        else:
            scales = scales.reshape(-1, 1)
        weight = pack_e4m3(
            tensors["weight"],
            scales,
            kind=self.kind,
            dtype=dtype,
            group_size=self.block[1],
            rows_per_scale=self.block[0],
        )
        if not isinstance(weight, QuantizedWeight):
            return weight
        if "input_scale" in tensors:
            scale = tensors["input_scale"].astype(np.float32).reshape(())
            if not (np.isfinite(scale) and scale > 0):
                raise WeightsError(f"its activations' scale is {scale}, not a positive number.")
            weight = with_static_activations(weight, jnp.asarray(scale), None)
        return replace(weight, input_limit=self.input_limit)


def _first(module: str, suffixes: tuple[str, ...], names: object) -> str:
    """The first name that is there; the first of all if none is."""
    candidates = [f"{module}.{suffix}" for suffix in suffixes]
    return next((name for name in candidates if name in names), candidates[0])  # type: ignore[operator]


def _shaped(
    name: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...], source: TensorSource
) -> SourceTensor:
    """A tensor that may have one of several shapes."""
    found = tuple(source.shape(name)) if name in source.names() else shapes[0]
    return SourceTensor(name, found if found in shapes else shapes[0], dtypes)


def explains_scale(name: str) -> bool:
    """Whether a tensor is a scale that belongs to such a checkpoint and is not needed: of activations that are
    quantized by each token's largest all the same, or of a cache.
    """
    return name.rpartition(".")[2] in _INPUT_SCALES or is_cache_scale(name)


@dataclass(frozen=True)
class Fp8:
    """The `WeightFormat`.

    Attributes:
        name: for logs and errors.
        layout: of every quantized module.
        excluded: modules that must be plain.
    """

    name: str
    layout: Layout
    excluded: Excluded = field(default_factory=Excluded)

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """See `WeightFormat`. A module that no list excludes may be plain all the same: heads are, and no config says
        so.
        """
        if module_of(matrix) in self.excluded or not is_e4m3(matrix.name, source):
            return None
        return self.layout.stored(matrix, source)

    def pack(self, matrix: SourceTensor, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
        """See `WeightFormat`."""
        return self.layout.pack(tensors, dtype)

    def explains(self, name: str) -> bool:
        """See `WeightFormat`."""
        return explains_scale(name)


def is_e4m3(name: str, source: TensorSource) -> bool:
    """Whether the checkpoint holds a tensor of that name in 8-bit floats."""
    return name in source.names() and source.dtype(name) == E4M3


def parse_fp8(raw: RawConfig) -> Fp8:
    """The format that a `quantization_config` with `quant_method: fp8` describes.

    Raises:
        UnsupportedModelError: a value that is not supported.
    """
    numbers = text(raw, "fmt", "e4m3")
    if numbers not in ("e4m3", "float8_e4m3fn"):
        refuse("quantization_config.fmt", numbers, "e4m3")
    scales = text(raw, "scale_fmt", "float")
    if scales not in ("float", "ue8m0"):
        refuse("quantization_config.scale_fmt", scales, "float or ue8m0")
    activations = text(raw, "activation_scheme", "dynamic")
    if activations not in ("dynamic", "static"):
        refuse("quantization_config.activation_scheme", activations, "dynamic or static")
    block = parse_block(raw, "weight_block_size")
    if block is None:
        layout = Layout("tensor", activations=activations)
    elif activations == "dynamic":
        layout = Layout("block", block)
    else:
        refuse("quantization_config.activation_scheme", activations, "dynamic where weights have blocks")
    return Fp8("fp8", layout, _excluded(raw))


def parse_fbgemm(raw: RawConfig) -> Fp8:
    """The format that a `quantization_config` with `quant_method: fbgemm_fp8` describes.

    Raises:
        UnsupportedModelError: a value that is not supported.
    """
    limit = number(raw, "activation_scale_ub", _FBGEMM_LIMIT)
    return Fp8("fbgemm_fp8", Layout("output", input_limit=limit), _excluded(raw))


def parse_block(raw: RawConfig, key: str) -> tuple[int, int] | None:
    """Outputs and inputs that share a scale; None if the field is absent.

    Raises:
        UnsupportedModelError: not two positive integers.
    """
    sizes = raw.get(key)
    if sizes is None:
        return None
    whole = isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
    if not whole:
        refuse(f"quantization_config.{key}", sizes, "two positive integers")
    return sizes[0], sizes[1]


def _excluded(raw: RawConfig) -> Excluded:
    return Excluded((*(strings(raw, "ignored_layers") or ()), *(strings(raw, "modules_to_not_convert") or ())))
