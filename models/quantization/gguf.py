"""Blocks of GGUF files that stay packed: Q8_0, Q4_0 and Q4_1, 32 numbers along a row that share a scale.

    Q8_0   d float16, 32 int8                          value = d * number
    Q4_0   d float16, 16 bytes                         value = d * (number - 8)
    Q4_1   d float16, m float16, 16 bytes              value = d * number + m

Byte j of 4-bit blocks holds number j below and number j + 16 above. On the device numbers are signed, 8 less than here:
those of Q4_1 get a zero point of -8, so that `d * number + m` is computed as it stands here. Moving the 8 into the
offset, `m + 8 * d`, would round.

Other kinds of blocks, the embedding and norms are dequantized while they are read (`models/loading/gguf.py`).

Source: ggml's `ggml-common.h` and the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from models.errors import WeightsError
from models.families.tensors import SourceTensor
from models.layers.product import Matrix
from models.loading.source import TensorSource
from models.quantization.integers import pack_integers

BLOCK = 32  # numbers that share a scale


@dataclass(frozen=True)
class Blocks:
    """A kind of blocks.

    Attributes:
        bits: of a number.
        has_minimum: whether a second float16 follows the scale, which is added to every number of the block.
    """

    bits: int
    has_minimum: bool = False

    @property
    def size_bytes(self) -> int:
        """Of a block."""
        return self._header_bytes + BLOCK * self.bits // 8

    @property
    def _header_bytes(self) -> int:
        return 4 if self.has_minimum else 2

    def pack(self, rows: np.ndarray, dtype: np.dtype) -> Matrix:
        """The matrix on the device of uint8[N, K / 32 * size_bytes].

        Raises:
            WeightsError: a scale or minimum is not finite.
        """
        blocks = rows.reshape(rows.shape[0], -1, self.size_bytes)
        header = np.ascontiguousarray(blocks[..., : self._header_bytes]).view("<f2")
        if not np.isfinite(header).all():
            raise WeightsError("its blocks hold scales that are not finite.")
        numbers = self._numbers(blocks[..., self._header_bytes :]).reshape(rows.shape[0], -1)
        scales, zeros = header[..., 0], np.zeros(header.shape[:-1], np.uint8)
        return pack_integers(
            jnp.asarray(numbers),
            jnp.asarray(scales),
            jnp.asarray(zeros) if self.has_minimum else None,
            bits=self.bits,
            group_size=BLOCK,
            dtype=dtype,
            offsets=jnp.asarray(header[..., 1]) if self.has_minimum else None,
        )

    def _numbers(self, stored: np.ndarray) -> np.ndarray:
        """uint8[N, G, 32], unsigned."""
        if self.bits == 8:
            return stored ^ np.uint8(0x80)  # two's complement plus 128
        return np.concatenate([stored & 15, stored >> 4], axis=-1)


KINDS: Mapping[str, Blocks] = {"Q8_0": Blocks(8), "Q4_0": Blocks(4), "Q4_1": Blocks(4, has_minimum=True)}
"""By the name that the `gguf` package gives them."""


def packed_name(name: str, kind: str) -> str:
    """Under which a source offers the blocks of a tensor, uint8[N, bytes of a row], in place of its values."""
    return f"{name}.{kind}"


@dataclass(frozen=True)
class Gguf:
    """The `WeightFormat` of a source that offers blocks (`models.loading.gguf.GgufTensors`).

    Attributes:
        name: for logs and errors.
    """

    name: str = "gguf"

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """See `WeightFormat`."""
        n, k = matrix.shape
        for kind, blocks in KINDS.items():
            name = packed_name(matrix.name, kind)
            if name in source.names():
                return {kind: SourceTensor(name, (n, -(-k // BLOCK) * blocks.size_bytes), ("uint8",))}
        return None

    def pack(self, matrix: SourceTensor, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
        """See `WeightFormat`."""
        ((kind, rows),) = tensors.items()
        return KINDS[kind].pack(rows, dtype)

    def explains(self, name: str) -> bool:
        """See `WeightFormat`: nothing, every block is read."""
        return False
