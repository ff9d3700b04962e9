"""AWQ checkpoints: `quant_method: awq` in the layout "gemm", and the same layout under another name (AutoRound).

    qweight int32[K, N / 8]     8 neighbouring outputs of one input in a word
    qzeros  int32[G, N / 8]     zero points as they are, in the same order; without `zero_point` all 8, or absent
    scales  float[G, N]

    value[n, k] = scales[k // group_size, n] * (number[n, k] - zero_point[k // group_size, n])

Outputs of a word lie in the order 0, 2, 4, 6, 1, 3, 5, 7, the lowest 4 bits first. The scales of activations that give
the method its name are part of the neighbouring layers' weights: nothing is left to do.

Sources: Lin et al. 2023 (arXiv 2306.00978) for the method; AutoAWQ's files for the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models.errors import WeightsError
from models.families.fields import RawConfig, flag, refuse, strings, text
from models.families.tensors import SourceTensor
from models.layers.product import Matrix
from models.loading.source import TensorSource
from models.quantization.format import module_of
from models.quantization.gptq import SCALES, Rule, parse_bits, parse_group_size
from models.quantization.integers import pack_integers

BITS = 4
_IN_WORD = 8
_MIDDLE = 1 << (BITS - 1)
_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # of each output among the 4-bit numbers of its word


@dataclass(frozen=True)
class Awq:
    """The `WeightFormat`.

    Attributes:
        name: for logs and errors.
        rule: of every module that is packed.
        has_zero_points: whether they may be others than 8.
        plain: modules whose names hold one of these are not quantized.
    """

    name: str
    rule: Rule
    has_zero_points: bool = True
    plain: Sequence[str] = ()

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """See `WeightFormat`. What is there decides, unless the config names the module as a plain one."""
        module = module_of(matrix)
        if f"{module}.qweight" not in source.names() or any(part in module for part in self.plain):
            return None
        n, k = matrix.shape
        # Writers refuse outputs that fill no whole word; asked for as if they did, such a file is misshapen.
        words, groups = -(-n // _IN_WORD), self.rule.num_groups(k)
        tensors = {
            "qweight": SourceTensor(f"{module}.qweight", (k, words), ("int32",)),
            "scales": SourceTensor(f"{module}.scales", (groups, n), SCALES),
        }
        if self.has_zero_points or f"{module}.qzeros" in source.names():
            tensors["qzeros"] = SourceTensor(f"{module}.qzeros", (groups, words), ("int32",))
        return tensors

    def pack(self, matrix: SourceTensor, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
        """See `WeightFormat`."""
        if not np.isfinite(tensors["scales"].astype(np.float32)).all():
            raise WeightsError("its scales hold numbers that are not finite.")
        n = matrix.shape[0]
        zeros = tensors.get("qzeros")
        zero_points = None if zeros is None else _unpack(jnp.asarray(zeros))[:, :n]
        if zero_points is not None and not self.has_zero_points and not bool((zero_points == _MIDDLE).all()):
            raise WeightsError(f"its config says that it has no zero points, and they are not all {_MIDDLE}.")
        return pack_integers(
            _unpack(jnp.asarray(tensors["qweight"]))[:, :n].T,
            jnp.asarray(tensors["scales"]).T,
            None if zero_points is None else zero_points.T,
            bits=BITS,
            group_size=self.rule.group_size,
            dtype=dtype,
        )

    def explains(self, name: str) -> bool:
        """See `WeightFormat`: nothing, every tensor of a module is read."""
        return False


@jax.jit
def _unpack(words: jax.Array) -> jax.Array:
    """uint8[rows, 8 * words] of int32[rows, words], outputs in order."""
    stream = lax.bitcast_convert_type(words, jnp.uint32)
    numbers = stream[..., None] >> (BITS * np.asarray(_PLACE, np.uint32))
    return (numbers & ((1 << BITS) - 1)).astype(jnp.uint8).reshape(words.shape[0], -1)


def parse_awq(raw: RawConfig) -> Awq:
    """The format that a config's `quantization_config` with `quant_method: awq` describes, or `quant_config.json`.

    Raises:
        UnsupportedModelError: a value that is not supported.
    """
    layout = text(raw, "version", "gemm").lower()
    if layout != "gemm":
        refuse("quantization_config.version", layout, "gemm: the only layout of AWQ that can be read")
    writer = text(raw, "backend", "autoawq")
    if writer == "llm-awq":
        refuse("quantization_config.backend", writer, "autoawq: the layout of llm-awq cannot be read")
    bits_key = _present(raw, "bits", "w_bit")
    if parse_bits(raw, key=bits_key) != BITS:
        refuse(f"quantization_config.{bits_key}", raw[bits_key], f"{BITS}: AWQ packs no others")
    group_size = parse_group_size(raw, key=_present(raw, "group_size", "q_group_size"))
    flag(raw, "lm_head", False)  # a check only: the head's tensors say it
    plain = tuple(part for part in strings(raw, "modules_to_not_convert") or () if part)
    return Awq("awq", Rule(BITS, group_size), flag(raw, "zero_point", True), plain)


def _present(raw: RawConfig, name: str, old_name: str) -> str:
    """Which of two names of a field is there."""
    return old_name if raw.get(name) is None and raw.get(old_name) is not None else name
