"""Matrix products of activations with packed weights: 4 or 8 bits, integers or floats, scales per output or group.

Weights are packed into a `QuantizedWeight` once, at load (`repack` of a checkpoint's numbers, `from_dense` by
rounding); `quantized_matmul` multiplies with it. Reading and decoding a checkpoint's own packing is not done here.
"""

from pallas_kernels.quantized_matmul.activations import quantize_activations
from pallas_kernels.quantized_matmul.api import OP, quantized_matmul
from pallas_kernels.quantized_matmul.problem import QuantizedMatmulProblem
from pallas_kernels.quantized_matmul.weight import (
    GROUP_SIZES,
    KINDS,
    QuantizedWeight,
    StaticActivations,
    dequantize,
    from_dense,
    repack,
    with_static_activations,
)

__all__ = [
    "GROUP_SIZES",
    "KINDS",
    "OP",
    "QuantizedMatmulProblem",
    "QuantizedWeight",
    "StaticActivations",
    "dequantize",
    "from_dense",
    "quantize_activations",
    "quantized_matmul",
    "repack",
    "with_static_activations",
]
