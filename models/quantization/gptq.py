"""GPTQ checkpoints: `quant_method: gptq`, and the same layout under other names (AutoRound).

    qweight int32[K * bits / 32, N]     a bit stream along K for each output
    qzeros  int32[G, N * bits / 32]     a bit stream along N; zero points minus one (`gptq`, version 1), or as they are
    scales  float[G, N]
    g_idx   int32[K]                    group of each input; with `desc_act` in no order

    value[n, k] = scales[g_idx[k], n] * (number[n, k] - zero_point[g_idx[k], n])

Sources: Frantar et al. 2022 (arXiv 2210.17323) for the method; AutoGPTQ's and GPTQModel's files for the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from models.families.fields import RawConfig, flag, refuse, table, text
from models.families.tensors import SourceTensor
from models.layers.product import Matrix
from models.loading.source import TensorSource
from models.quantization import bitstream
from models.quantization.format import module_of
from models.quantization.integers import finite, pack_integers
from models.quantization.rules import (
    PatternRules,
    Rule,
    Rules,
    parse_bits,
    parse_group_size,
    parse_pattern,
)

ROLES = ("qweight", "qzeros", "scales", "g_idx")
SCALES = ("float16", "bfloat16", "float32")
# Adding 1 to each zero point of a word at once, so that a borrow that the writer let run into its neighbour is undone.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class Gptq:
    """The `WeightFormat`.

    Attributes:
        name: for logs and errors.
        rules: bits and groups of each module.
        minus_one: whether stored zero points are one less than they should be.
    """

    name: str
    rules: Rules
    minus_one: bool

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """See `WeightFormat`. What is there decides: configs leave open which modules are quantized."""
        module = module_of(matrix)
        if f"{module}.qweight" not in source.names():
            return None
        rule = self.rules.of(module)
        n, k = matrix.shape
        groups = rule.num_groups(k)
        tensors = {
            "qweight": SourceTensor(f"{module}.qweight", (bitstream.num_words(k, rule.bits), n), ("int32",)),
            "qzeros": SourceTensor(f"{module}.qzeros", (groups, bitstream.num_words(n, rule.bits)), ("int32",)),
            "scales": SourceTensor(f"{module}.scales", (groups, n), SCALES),
        }
        if f"{module}.g_idx" in source.names():
            tensors["g_idx"] = SourceTensor(f"{module}.g_idx", (k,), ("int32", "int64"))
        return tensors

    def pack(self, matrix: SourceTensor, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
        """See `WeightFormat`."""
        rule = self.rules.of(module_of(matrix))
        n, k = matrix.shape
        words = np.ascontiguousarray(tensors["qweight"].T)
        zeros = tensors["qzeros"]
        if self.minus_one and rule.bits in _ONES:
            zeros = (zeros.view(np.uint32) + np.uint32(_ONES[rule.bits])).view(np.int32)
        zero_points = bitstream.unpack(jnp.asarray(zeros), bits=rule.bits, count=n)
        if self.minus_one and rule.bits not in _ONES:
            zero_points = (zero_points + 1) & ((1 << rule.bits) - 1)
        return pack_integers(
            bitstream.unpack(jnp.asarray(words), bits=rule.bits, count=k),
            jnp.asarray(finite(tensors["scales"])).T,
            zero_points.T,
            bits=rule.bits,
            group_size=rule.group_size,
            dtype=dtype,
            group_of=tensors.get("g_idx"),
        )

    def explains(self, name: str) -> bool:
        """See `WeightFormat`: nothing, every tensor of a module is read."""
        return False


def parse_gptq(raw: RawConfig) -> Gptq:
    """The format that a config's `quantization_config` with `quant_method: gptq` describes.

    Raises:
        UnsupportedModelError: a value that is not supported.
    """
    rule = Rule(parse_bits(raw), parse_group_size(raw))
    layout = text(raw, "checkpoint_format", text(raw, "format", "gptq"))
    if layout not in ("gptq", "gptq_v2"):
        refuse("quantization_config.checkpoint_format", layout, "gptq or gptq_v2")
    flag(raw, "desc_act", False)  # a check only: g_idx says it
    overrides = []
    for pattern, changes in table(raw, "dynamic").items():
        compiled = parse_pattern(pattern.removeprefix("-:").removeprefix("+:"), "quantization_config.dynamic")
        if pattern.startswith("-:"):  # a module that is not quantized: what is there says so
            continue
        if not isinstance(changes, dict):
            refuse(f"quantization_config.dynamic[{pattern!r}]", changes, "an object")
        changed = replace(
            rule,
            bits=parse_bits(changes, rule.bits),
            group_size=parse_group_size(changes, rule.group_size),
        )
        overrides.append((compiled, changed))
    return Gptq("gptq", PatternRules(rule, tuple(overrides)), layout == "gptq")
