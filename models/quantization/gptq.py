"""GPTQ checkpoints: `quant_method: gptq`, and the same layout under other names (AutoRound).

    qweight int32[K * bits / 32, N]     a bit stream along K for each output
    qzeros  int32[G, N * bits / 32]     a bit stream along N; zero points minus one (`gptq`, version 1), or as they are
    scales  float[G, N]
    g_idx   int32[K]                    group of each input; with `desc_act` in no order

    value[n, k] = scales[g_idx[k], n] * (number[n, k] - zero_point[g_idx[k], n])

Sources: Frantar et al. 2022 (arXiv 2210.17323) for the method; AutoGPTQ's and GPTQModel's files for the layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from models.errors import UnsupportedModelError, WeightsError
from models.families.fields import RawConfig, flag, refuse, table, text
from models.families.tensors import SourceTensor
from models.layers.product import Matrix
from models.loading.source import TensorSource
from models.quantization import bitstream
from models.quantization.format import module_of
from models.quantization.integers import pack_integers

ROLES = ("qweight", "qzeros", "scales", "g_idx")
SCALES = ("float16", "bfloat16", "float32")
# Adding 1 to each zero point of a word at once, so that a borrow that the writer let run into its neighbour is undone.
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class Rule:
    """How one module is stored.

    Attributes:
        bits: of a number.
        group_size: inputs that share a scale; -1 = all.
    """

    bits: int
    group_size: int

    def num_groups(self, num_inputs: int) -> int:
        """Of a matrix with so many inputs; the last may be short."""
        return 1 if self.group_size < 0 else -(-num_inputs // self.group_size)


@dataclass(frozen=True)
class Gptq:
    """The `WeightFormat`.

    Attributes:
        name: for logs and errors.
        rule: of modules that no override names.
        minus_one: whether stored zero points are one less than they should be.
        overrides: (pattern matched at the start of a module's name, its rule; None = not quantized), first match wins.
    """

    name: str
    rule: Rule
    minus_one: bool
    overrides: Sequence[tuple[re.Pattern[str], Rule | None]] = ()

    def rule_of(self, module: str) -> Rule | None:
        """How a module is stored; None = plain."""
        for pattern, rule in self.overrides:
            if pattern.match(module):
                return rule
        return self.rule

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """See `WeightFormat`. What is there decides: configs leave open which modules are quantized. Not those that a
        rule of `dynamic` excludes.
        """
        module = module_of(matrix)
        if f"{module}.qweight" not in source.names():
            return None
        rule = self.rule_of(module)
        if rule is None:
            raise UnsupportedModelError(
                f"config.json: a rule of quantization_config.dynamic ('-:...') says that {module} is not quantized, "
                f"but the checkpoint holds {module}.qweight. Remove the rule if it is quantized like the others."
            )
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
        rule = self.rule_of(module_of(matrix))
        assert rule is not None  # `stored` has found it
        n, k = matrix.shape
        words = np.ascontiguousarray(tensors["qweight"].T)
        zeros = tensors["qzeros"]
        if self.minus_one and rule.bits in ONES:
            zeros = (zeros.view(np.uint32) + np.uint32(ONES[rule.bits])).view(np.int32)
        zero_points = bitstream.unpack(jnp.asarray(zeros), bits=rule.bits, count=n)
        if self.minus_one and rule.bits not in ONES:
            zero_points = (zero_points + 1) & ((1 << rule.bits) - 1)
        if not np.isfinite(tensors["scales"].astype(np.float32)).all():
            raise WeightsError("its scales hold numbers that are not finite.")
        return pack_integers(
            bitstream.unpack(jnp.asarray(words), bits=rule.bits, count=k),
            jnp.asarray(tensors["scales"]).T,
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
        if pattern.startswith("-:"):
            overrides.append((compiled, None))
            continue
        if not isinstance(changes, dict):
            refuse(f"quantization_config.dynamic[{pattern!r}]", changes, "an object")
        changed = replace(
            rule,
            bits=parse_bits(changes, rule.bits),
            group_size=parse_group_size(changes, rule.group_size),
        )
        overrides.append((compiled, changed))
    return Gptq("gptq", rule, layout == "gptq", tuple(overrides))


def parse_bits(raw: RawConfig, default: int | None = None, key: str = "bits") -> int:
    """Bits of a number.

    Raises:
        UnsupportedModelError: none of 2 to 8.
    """
    bits = raw.get(key, default)
    if isinstance(bits, bool) or bits not in bitstream.BITS:
        refuse(f"quantization_config.{key}", bits, "an integer from 2 to 8")
    return bits


def parse_group_size(raw: RawConfig, default: int | None = None, key: str = "group_size") -> int:
    """Inputs that share a scale; -1 = all.

    Raises:
        UnsupportedModelError: neither -1 nor positive.
    """
    size = raw.get(key, default)
    if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and size < 1):
        refuse(f"quantization_config.{key}", size, "-1 or a positive integer")
    return size


def parse_pattern(pattern: str, key: str) -> re.Pattern[str]:
    """A regular expression of a config.

    Raises:
        UnsupportedModelError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UnsupportedModelError(f"config.json: {key} has the invalid pattern {pattern!r}: {error}.") from error
