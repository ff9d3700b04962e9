"""Checkpoints of llm-compressor and others: `quant_method: compressed-tensors`.

    pack-quantized    weight_packed int32[N, K * bits / 32], a bit stream along K; weight_scale [N, G];
                      weight_zero_point int32[N * bits / 32, G], a bit stream along N; weight_g_idx [K]
    int-quantized     weight int8[N, K], weight_scale [N, 1], [1] or [N, G]; input_scale [1], input_zero_point [1]
    float-quantized   weight e4m3[N, K], weight_scale [1], [N, 1] or one for each block; input_scale [1]
    nvfp4-, mxfp4-pack-quantized, mxfp8-quantized
                      numbers of 4 or 8 bits in small groups: dequantized at load

    value[n, k] = (number[n, k] - zero_point[n, g]) * weight_scale[n, g]

Packed numbers and zero points are unsigned, 2^(bits - 1) more than their values. Groups of activations that are
quantized at run time are those of the weights: per token, or per token and group.

Source: the `compressed-tensors` project, `compressors/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from models.errors import UnsupportedModelError, WeightsError
from models.families.fields import RawConfig, refuse, table, text
from models.families.tensors import SourceTensor
from models.layers.product import Matrix
from models.loading.source import TensorSource
from models.quantization import bitstream
from models.quantization.compressed_schemes import (
    FLOATS,
    INTEGERS,
    MXFP4,
    MXFP8,
    NVFP4,
    PACKED,
    Scheme,
    parse_ignored,
    parse_schemes,
    scheme_of,
)
from models.quantization.floats import (
    E4M3,
    SCALES,
    from_e2m1,
    from_e8m0,
    is_cache_scale,
    pack_e4m3,
    scaled_dense,
    usable_scales,
)
from models.quantization.format import module_of
from models.quantization.integers import finite, groups_that_fit, pack_integers
from pallas_kernels.quantized_matmul import QuantizedWeight, repack, with_static_activations

_NOT_NEEDED = ("weight_shape", "input_global_scale", "output_scale", "input_scale")
_KV_DTYPES = {("float", 8): "fp8", ("int", 8): "int8"}


@dataclass(frozen=True)
class CompressedTensors:
    """The `WeightFormat`.

    Attributes:
        schemes: of groups of modules.
        ignored: names and `re:` patterns of modules that are plain.
        name: for logs and errors.
    """

    schemes: Sequence[Scheme]
    ignored: Sequence[str]
    name: str = "compressed-tensors"

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """See `WeightFormat`. A module that no list ignores may be plain all the same: embeddings and heads are."""
        module, names = module_of(matrix), source.names()
        scheme = scheme_of(module, self.schemes, self.ignored)
        if scheme is None or not any(f"{module}.{name}" in names for name in ("weight_packed", "weight_scale")):
            return None
        tensors = _weights(scheme, matrix, module, source)
        if scheme.inputs is not None and not scheme.inputs.is_dynamic and scheme.format in (INTEGERS, FLOATS, PACKED):
            tensors["input_scale"] = _one(f"{module}.input_scale", SCALES, source)
            if not scheme.inputs.symmetric:
                tensors["input_zero_point"] = _one(f"{module}.input_zero_point", ("int8", "int32"), source)
        return tensors

    def pack(self, matrix: SourceTensor, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
        """See `WeightFormat`."""
        scheme = scheme_of(module_of(matrix), self.schemes, self.ignored)
        assert scheme is not None  # `stored` has found it
        n, k = matrix.shape
        if scheme.format in (NVFP4, MXFP4, MXFP8):
            return _pack_small(scheme.format, tensors, dtype)
        if scheme.format == FLOATS:
            weight = _pack_floats(scheme, tensors, dtype)
        elif scheme.inputs is None:
            return _pack_weight_only(scheme, tensors, n, k, dtype)
        else:
            weight = _pack_met_by_integers(scheme, tensors, k)
        if "input_scale" in tensors and isinstance(weight, QuantizedWeight):
            weight = _with_inputs(weight, tensors)
        return weight

    def explains(self, name: str) -> bool:
        """See `WeightFormat`: scales of caches, of attention and of activations that are measured at run time."""
        return name.rpartition(".")[2] in _NOT_NEEDED or is_cache_scale(name)


# --- what is stored ---------------------------------------------------------------------------------------------------


def _weights(scheme: Scheme, matrix: SourceTensor, module: str, source: TensorSource) -> dict[str, SourceTensor]:
    n, k = matrix.shape
    weights, groups = scheme.weights, _num_groups(scheme, k)

    def tensor(name: str, shape: tuple[int, ...], *dtypes: str) -> SourceTensor:
        return SourceTensor(f"{module}.{name}", shape, dtypes)

    if scheme.format == PACKED:
        words = bitstream.num_words(k, weights.bits)
        tensors = {
            "packed": tensor("weight_packed", (n, words), "int32"),
            "scales": _scales(scheme, module, n, k, source),
        }
        if not weights.symmetric:
            zeros = (bitstream.num_words(n, weights.bits), groups)
            tensors["zeros"] = tensor("weight_zero_point", zeros, "int32")
        if f"{module}.weight_g_idx" in source.names():
            tensors["g_idx"] = tensor("weight_g_idx", (k,), "int32", "int64")
        return tensors
    if scheme.format == NVFP4:
        return {
            "packed": tensor("weight_packed", (n, k // 2), "uint8"),
            "scales": tensor("weight_scale", (n, groups), E4M3),
            "global_scale": _one(f"{module}.weight_global_scale", ("float32",), source),
        }
    if scheme.format == MXFP4:
        packed, scales = (n, k // 2), (n, groups)
        return {"packed": tensor("weight_packed", packed, "uint8"), "scales": tensor("weight_scale", scales, "uint8")}
    if scheme.format == MXFP8:
        return {"weight": tensor("weight", (n, k), E4M3), "scales": tensor("weight_scale", (n, groups), "uint8")}
    number = E4M3 if scheme.format == FLOATS else "int8"
    tensors = {"weight": tensor("weight", (n, k), number), "scales": _scales(scheme, module, n, k, source)}
    if not weights.symmetric:
        tensors["zeros"] = replace(_scales(scheme, module, n, k, source, "weight_zero_point"), dtypes=("int8",))
    return tensors


def _num_groups(scheme: Scheme, k: int) -> int:
    size = scheme.weights.group_size
    return 1 if size < 0 else -(-k // size)


def _scales(
    scheme: Scheme, module: str, n: int, k: int, source: TensorSource, name: str = "weight_scale"
) -> SourceTensor:
    weights = scheme.weights
    if weights.strategy == "block":
        rows, columns = weights.block
        return SourceTensor(f"{module}.{name}", (-(-n // rows), -(-k // columns)), SCALES)
    if weights.strategy == "tensor":
        return _one(f"{module}.{name}", SCALES, source)
    return SourceTensor(f"{module}.{name}", (n, _num_groups(scheme, k)), SCALES)


def _one(name: str, dtypes: tuple[str, ...], source: TensorSource) -> SourceTensor:
    """A single number, with or without an axis."""
    found = tuple(source.shape(name)) if name in source.names() else (1,)
    return SourceTensor(name, found if found in ((), (1,), (1, 1)) else (1,), dtypes)


# --- and what becomes of it -------------------------------------------------------------------------------------------


def _numbers(scheme: Scheme, tensors: Mapping[str, np.ndarray], k: int) -> jnp.ndarray:
    """Unsigned [N, K]."""
    bits = scheme.weights.bits
    if scheme.format == PACKED:
        return bitstream.unpack(jnp.asarray(tensors["packed"]), bits=bits, count=k)
    return (jnp.asarray(tensors["weight"]).astype(jnp.int16) + (1 << (bits - 1))).astype(jnp.uint8)


def _scales_of(tensors: Mapping[str, np.ndarray], n: int) -> jnp.ndarray:
    """[N, G] in the checkpoint's dtype."""
    scales = finite(tensors["scales"])
    return jnp.broadcast_to(
        jnp.asarray(scales.reshape(-1, scales.shape[-1] if scales.ndim > 1 else 1)), (n, _groups(scales))
    )


def _groups(scales: np.ndarray) -> int:
    return scales.shape[-1] if scales.ndim > 1 else 1


def _pack_weight_only(scheme: Scheme, tensors: Mapping[str, np.ndarray], n: int, k: int, dtype: np.dtype) -> Matrix:
    bits, zeros = scheme.weights.bits, tensors.get("zeros")
    zero_points = None
    if zeros is not None and scheme.format == PACKED:
        zero_points = bitstream.unpack(jnp.asarray(np.ascontiguousarray(zeros.T)), bits=bits, count=n).T
    elif zeros is not None:
        signed = jnp.asarray(zeros.reshape(-1, _groups(zeros))).astype(jnp.int16)
        zero_points = jnp.broadcast_to(signed + (1 << (bits - 1)), (n, signed.shape[-1])).astype(jnp.uint8)
    group_of = tensors.get("g_idx")
    if group_of is not None and (group_of == -1).all():
        group_of = None  # as a file says "in order"
    if scheme.weights.strategy == "block":
        raise WeightsError("integers in blocks are not supported.")
    return pack_integers(
        _numbers(scheme, tensors, k),
        _scales_of(tensors, n),
        zero_points,
        bits=bits,
        group_size=scheme.weights.group_size,
        dtype=dtype,
        group_of=group_of,
    )


def _pack_met_by_integers(scheme: Scheme, tensors: Mapping[str, np.ndarray], k: int) -> QuantizedWeight:
    """Weights of 8 bits or fewer that meet activations of 8: all lie in int8."""
    if "g_idx" in tensors and (np.diff(tensors["g_idx"]) < 0).any():
        raise WeightsError(
            "its groups are in activation order, which is not supported where activations are quantized."
        )
    numbers = _numbers(scheme, tensors, k)
    signed = numbers.astype(jnp.int16) - (1 << (scheme.weights.bits - 1))
    scales, size = _scales_of(tensors, numbers.shape[0]), scheme.weights.group_size
    fits = groups_that_fit(size, k)
    if fits is None:
        raise WeightsError(f"groups of {size} among {k} inputs are not those of any product of integers.")
    if fits > 0:
        scales = scales[:, np.arange(k // fits) * fits // size]
    return repack(signed, scales, kind="w8a8", group_size=fits)


def _pack_floats(scheme: Scheme, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
    scales, (rows, columns) = tensors["scales"], scheme.weights.block
    if scheme.weights.strategy == "group":
        columns = scheme.weights.group_size
    return pack_e4m3(
        tensors["weight"],
        scales.reshape(-1, _groups(scales)),
        kind="w8a16_fp8" if scheme.inputs is None else "w8a8_fp8",
        dtype=dtype,
        group_size=columns,
        rows_per_scale=rows,
    )


def _pack_small(layout: str, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
    """Dense, from numbers in small groups."""
    if layout == MXFP8:
        numbers, scales = tensors["weight"].astype(np.float32), from_e8m0(tensors["scales"])
    else:
        numbers = from_e2m1(tensors["packed"])
        scales = from_e8m0(tensors["scales"]) if layout == MXFP4 else usable_scales(tensors["scales"])
    if layout == NVFP4:
        scales = scales / finite(tensors["global_scale"]).reshape(()).astype(np.float32)
    size = -(-numbers.shape[1] // scales.shape[1])
    return scaled_dense(jnp.asarray(numbers), jnp.asarray(scales), size, dtype)


def _with_inputs(weight: QuantizedWeight, tensors: Mapping[str, np.ndarray]) -> QuantizedWeight:
    scale = tensors["input_scale"].astype(np.float32).reshape(())
    if not (np.isfinite(scale) and scale > 0):
        raise WeightsError(f"its activations' scale is {scale}, not a positive number.")
    zero = tensors.get("input_zero_point")
    return with_static_activations(
        weight, jnp.asarray(scale), None if zero is None else jnp.asarray(zero.reshape(()).astype(np.int32))
    )


def parse_compressed_tensors(raw: RawConfig) -> CompressedTensors:
    """The format that a `quantization_config` with `quant_method: compressed-tensors` describes.

    Raises:
        UnsupportedModelError: a value that is not supported.
    """
    if table(raw, "transform_config").get("config_groups"):
        raise UnsupportedModelError(
            "config.json: quantization_config.transform_config rotates weights, which is not supported."
        )
    sparsity = text(table(raw, "sparsity_config"), "format", "dense")
    if sparsity != "dense":
        refuse("quantization_config.sparsity_config.format", sparsity, "dense: sparse weights are not supported")
    status = text(raw, "quantization_status", "compressed")
    if status != "compressed":
        refuse("quantization_config.quantization_status", status, "compressed")
    return CompressedTensors(parse_schemes(raw), parse_ignored(raw))


def kv_cache_dtype_of(raw: RawConfig) -> str | None:
    """What `kv_cache_scheme` asks for: "fp8" or "int8"; None if there is none.

    Raises:
        UnsupportedModelError: something else.
    """
    scheme = table(raw, "kv_cache_scheme")
    if not scheme:
        return None
    asked = (text(scheme, "type", "int"), scheme.get("num_bits", 8))
    if asked not in _KV_DTYPES:
        refuse("quantization_config.kv_cache_scheme", dict(scheme), "of 8-bit float or int")
    return _KV_DTYPES[asked]
