"""AWQ checkpoints: `quant_method: awq`, version gemm, and the same layout under other names (AutoRound).

    qweight int32[K, N / 8]     eight outputs a word, in the order below
    qzeros  int32[G, N / 8]     zero points likewise; may be absent where there are none
    scales  float[G, N]

    value[n, k] = scales[k // group_size, n] * (number[n, k] - zero_point[k // group_size, n])

The scales of activations that give the method its name are folded into the layer before: nothing is left of them here.

Sources: Lin et al. 2023 (arXiv 2306.00978) for the method; AutoAWQ's files for the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models.families.fields import RawConfig, flag, refuse, text
from models.families.tensors import SourceTensor
from models.layers.product import Matrix
from models.loading.source import TensorSource
from models.quantization.format import module_of
from models.quantization.integers import finite, pack_integers
from models.quantization.rules import PatternRules, Rule, Rules, parse_group_size

BITS, PER_WORD = 4, 8
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # of a word, for outputs 0 to 7
SCALES = ("float16", "bfloat16", "float32")


@jax.jit
def unpack_columns(words: jax.Array) -> jax.Array:
    """uint8[R, N] of int32[R, N / 8]."""
    shifts = jnp.array(_NIBBLES, jnp.uint32) * BITS
    numbers = (lax.bitcast_convert_type(words, jnp.uint32)[..., None] >> shifts) & 15
    return numbers.astype(jnp.uint8).reshape(words.shape[0], -1)


@dataclass(frozen=True)
class Awq:
    """The `WeightFormat`.

    Attributes:
        name: for logs and errors.
        rules: groups of each module; all have 4 bits.
    """

    name: str
    rules: Rules

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """See `WeightFormat`. What is there decides: lists of what is left out name parts of names."""
        module = module_of(matrix)
        if f"{module}.qweight" not in source.names():
            return None
        n, k = matrix.shape
        groups = self.rules.of(module).num_groups(k)
        tensors = {
            "qweight": SourceTensor(f"{module}.qweight", (k, n // PER_WORD), ("int32",)),
            "scales": SourceTensor(f"{module}.scales", (groups, n), SCALES),
        }
        if f"{module}.qzeros" in source.names():
            tensors["qzeros"] = SourceTensor(f"{module}.qzeros", (groups, n // PER_WORD), ("int32",))
        return tensors

    def pack(self, matrix: SourceTensor, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
        """See `WeightFormat`."""
        zeros = tensors.get("qzeros")
        return pack_integers(
            unpack_columns(jnp.asarray(tensors["qweight"])).T,
            jnp.asarray(finite(tensors["scales"])).T,
            None if zeros is None else unpack_columns(jnp.asarray(zeros)).T,
            bits=BITS,
            group_size=self.rules.of(module_of(matrix)).group_size,
            dtype=dtype,
        )

    def explains(self, name: str) -> bool:
        """See `WeightFormat`: nothing, every tensor of a module is read."""
        return False


def parse_awq(raw: RawConfig) -> Awq:
    """The format that a config's `quantization_config` with `quant_method: awq` describes.

    Raises:
        UnsupportedModelError: a value that is not supported.
    """
    bits = raw.get("bits", raw.get("w_bit", BITS))
    if bits != BITS:
        refuse("quantization_config.bits", bits, "4 for AWQ")
    version = text(raw, "version", "gemm").lower()
    if version != "gemm":
        refuse("quantization_config.version", version, "gemm: other versions order their words otherwise")
    flag(raw, "zero_point", True)  # a check only: qzeros say it
    key = "group_size" if "group_size" in raw else "q_group_size"
    return Awq("awq", PatternRules(Rule(BITS, parse_group_size(raw, 128, key))))
