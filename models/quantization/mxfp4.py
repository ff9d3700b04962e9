"""Checkpoints in MXFP4: `quant_method: mxfp4`, the layout of gpt-oss.

    weight_blocks  uint8[N, K/32, 16]   32 numbers in e2m1, two a byte, the lower nibble first
    weight_scales  uint8[N, K/32]       in e8m0

    value[n, k] = number[n, k] * 2^(scale[n, k // 32] - 127)

gpt-oss stores its experts so, under their parameters' names with the same two endings. Models with experts are not
served yet: this reads dense layers.

Source: OCP Microscaling Formats (MX) 1.0; gpt-oss's files for names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from models.families.fields import RawConfig, strings
from models.families.tensors import SourceTensor
from models.layers.product import Matrix
from models.loading.source import TensorSource
from models.quantization.floats import from_e2m1, from_e8m0
from models.quantization.format import module_of
from models.quantization.modules import Excluded

BLOCK = 32  # numbers that share a scale
_BYTES = BLOCK // 2


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32[..., 32 * G] of uint8[..., G, 16] and uint8[..., G].

    Raises:
        WeightsError: a scale is no number.
    """
    values = from_e2m1(blocks) * from_e8m0(scales)[..., None]
    return values.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)


@dataclass(frozen=True)
class Mxfp4:
    """The `WeightFormat`: matrices are dequantized at load.

    Attributes:
        name: for logs and errors.
        excluded: modules that must be plain.
    """

    name: str
    excluded: Excluded = field(default_factory=Excluded)

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """See `WeightFormat`. What is there decides: configs leave open which modules are quantized."""
        blocks, scales = f"{matrix.name}_blocks", f"{matrix.name}_scales"
        if blocks not in source.names() or module_of(matrix) in self.excluded:
            return None
        n, groups = matrix.shape[0], -(-matrix.shape[1] // BLOCK)
        return {
            "blocks": SourceTensor(blocks, (n, groups, _BYTES), ("uint8",)),
            "scales": SourceTensor(scales, (n, groups), ("uint8",)),
        }

    def pack(self, matrix: SourceTensor, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
        """See `WeightFormat`."""
        values = from_mxfp4(tensors["blocks"], tensors["scales"])[:, : matrix.shape[1]]
        return jnp.asarray(values).T.astype(dtype)

    def explains(self, name: str) -> bool:
        """See `WeightFormat`: nothing, every tensor of a module is read."""
        return False


def parse_mxfp4(raw: RawConfig) -> Mxfp4:
    """The format that a `quantization_config` with `quant_method: mxfp4` describes.

    Raises:
        UnsupportedModelError: a value that is not supported.
    """
    return Mxfp4("mxfp4", Excluded(strings(raw, "modules_to_not_convert") or ()))
