"""AutoRound checkpoints: `quant_method: auto-round`. Its integers lie as GPTQ's or AWQ's do; `packing_format` says how.

    auto_round:auto_gptq    GPTQ's layout without g_idx, zero points minus one; what is written for symmetric weights
    auto_round              the same, zero points as they are
    auto_round:auto_awq     AWQ's layout "gemm"
    auto_round:fp8          8-bit floats: as `quant_method: fp8`
    auto_round:llm_compressor   as `quant_method: compressed-tensors`

Scales of symmetric weights are negative where the largest weight of a group is: -8 reaches further than 7.

`extra_config` says which modules are stored otherwise (16 bits: not quantized), by name, last parts of the name, or
regular expression; in this order of precedence, as transformers and vLLM resolve it. Modules outside of
`block_name_to_quantize` that it does not name are not quantized.

Sources: Cheng et al. 2023 (arXiv 2309.05516) for the method; AutoRound's files for the layouts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.families.fields import RawConfig, flag, optional_integer, refuse, table, text
from models.families.tensors import SourceTensor
from models.layers.product import Matrix
from models.loading.source import TensorSource
from models.quantization import awq
from models.quantization.format import WeightFormat, module_of
from models.quantization.gptq import Gptq, Rule, parse_bits, parse_group_size, parse_pattern

NAME = "auto-round"
NAMES = (NAME, "intel/auto-round")
_PLAIN_BITS = 16
_PATTERN_MARKS = frozenset("*+?^$()[]{}|\\")
_ROTATIONS = ("rotation_config", "spinquant_config", "transform_config")
_LAYOUTS = "auto_round, auto_round:auto_gptq, auto_round:auto_awq, auto_round:fp8 or auto_round:llm_compressor"
# Names of old releases, which named the kernel that they had in mind too ("auto_round:gptq:exllamav2").
_KERNELS = (":exllamav2", ":tritonv2", ":triton", ":marlin", ":cuda")
_OLD_LAYOUTS = {
    "auto": "auto_round:auto_gptq",
    "auto_round:gptq": "auto_round:auto_gptq",
    "auto_round:gptqmodel": "auto_round",  # with g_idx, and zero points as they are
    "auto_round:awq": "auto_round:auto_awq",
}


@dataclass(frozen=True)
class ModuleRules:
    """Which module is stored how.

    Attributes:
        rule: of modules that nothing else names.
        by_name: full names, or last parts of them, -> rule; None = not quantized.
        by_pattern: (pattern searched for in a module's name, rule), first match wins.
        blocks: prefixes of the names of modules that `rule` is for; empty = all.
    """

    rule: Rule
    by_name: Mapping[str, Rule | None]
    by_pattern: Sequence[tuple[re.Pattern[str], Rule | None]] = ()
    blocks: Sequence[str] = ()

    def of(self, module: str) -> Rule | None:
        """The rule of a module; None if it is not quantized."""
        if module in self.by_name:
            return self.by_name[module]
        for name, rule in self.by_name.items():
            if module.endswith(f".{name}"):
                return rule
        for pattern, rule in self.by_pattern:
            if pattern.search(module):
                return rule
        inside = not self.blocks or any(f"{module}.".startswith(f"{block}.") for block in self.blocks)
        return self.rule if inside else None


@dataclass(frozen=True)
class AutoRound:
    """The `WeightFormat`.

    Attributes:
        rules: of modules.
        layout: (rule) -> the format that lays weights out in the same way.
    """

    rules: ModuleRules
    layout: Callable[[Rule], WeightFormat]

    @property
    def name(self) -> str:
        """See `WeightFormat`."""
        return NAME

    def stored(self, parameter: str, matrix: SourceTensor, source: TensorSource) -> Mapping[str, SourceTensor] | None:
        """See `WeightFormat`."""
        rule = self.rules.of(module_of(matrix))
        return None if rule is None else self.layout(rule).stored(parameter, matrix, source)

    def pack(self, matrix: SourceTensor, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Matrix:
        """See `WeightFormat`."""
        return self.layout(self.rules.of(module_of(matrix)) or self.rules.rule).pack(matrix, tensors, dtype)

    def explains(self, name: str) -> bool:
        """See `WeightFormat`: nothing, every tensor of a module is read."""
        return False


def parse_auto_round(raw: RawConfig) -> AutoRound:
    """The format that a config's `quantization_config` with `quant_method: auto-round` describes, of integers.

    Raises:
        UnsupportedModelError: a value that is not supported.
    """
    layout = layout_of(raw)
    for key in _ROTATIONS:
        if raw.get(key):
            refuse(f"quantization_config.{key}", raw[key], "absent: inputs cannot be rotated")
    _require_runnable(raw, "quantization_config")
    rule = _rule(raw, "quantization_config", None)
    if rule is None:
        refuse("quantization_config.bits", _PLAIN_BITS, "an integer from 2 to 8")
    flag(raw, "sym", True)  # a check only: zero points are there in any case
    rules = _module_rules(raw, rule)
    if layout == "auto_round:auto_awq":
        named = [*rules.by_name.values(), *(each for _, each in rules.by_pattern)]
        for each in (rule, *(each for each in named if each is not None)):
            if each.bits != awq.BITS:
                refuse("quantization_config.bits", each.bits, f"{awq.BITS} with packing_format {layout}")
        return AutoRound(rules, lambda each: awq.Awq(NAME, each))
    if layout not in ("auto_round", "auto_round:auto_gptq"):
        refuse("quantization_config.packing_format", layout, _LAYOUTS)
    minus_one = layout == "auto_round:auto_gptq"
    return AutoRound(rules, lambda each: Gptq(NAME, each, minus_one))


def layout_of(raw: RawConfig) -> str:
    """`packing_format` by its present name; of old releases' configs, what `backend` says."""
    layout = text(raw, "packing_format", "")
    if not layout:
        backend = text(raw, "backend", "")  # since then the name of a kernel that the user prefers
        layout = backend if backend.startswith(("auto_round", "autoround", "auto-round")) else "auto_round:auto_gptq"
    layout = re.sub(r"^auto-?round", "auto_round", layout)
    for kernel in _KERNELS:
        layout = layout.removesuffix(kernel)
    return _OLD_LAYOUTS.get(layout, layout)


def delegated(raw: RawConfig, method: str) -> tuple[RawConfig, str]:
    """The config and method that say the same of a checkpoint whose weights AutoRound stores as another method does.

    Args:
        raw: the `quantization_config`.
        method: its `quant_method`.

    Returns:
        Both as they are if no other method's layout is used.

    Raises:
        UnsupportedModelError: a value that the other method has no word for.
    """
    if method not in NAMES:
        return raw, method
    layout = layout_of(raw)
    if layout in ("auto_round:fp8", "auto_round:fp8_static"):
        return _as_fp8(raw), "fp8"
    if layout == "auto_round:llm_compressor":
        return _as_compressed_tensors(raw), "compressed-tensors"
    return raw, method


def _as_fp8(raw: RawConfig) -> RawConfig:
    if optional_integer(raw, "act_bits") != 8:
        refuse("quantization_config.act_bits", raw.get("act_bits"), "8 with 8-bit floats")
    size = raw.get("group_size")
    if isinstance(size, list) and len(size) == 2:
        block = {"weight_block_size": size}
    elif size == 0:
        block = {}
    else:
        refuse("quantization_config.group_size", size, "two sizes of a block, or 0 for one scale, with 8-bit floats")
    scheme = "dynamic" if flag(raw, "act_dynamic", True) else "static"
    return {"quant_method": "fp8", "activation_scheme": scheme, "modules_to_not_convert": _left_plain(raw), **block}


def _as_compressed_tensors(raw: RawConfig) -> RawConfig:
    kind, bits = text(raw, "data_type", "int"), optional_integer(raw, "bits")
    formats = {
        ("mx_fp", 4): "mxfp4-pack-quantized",
        ("mx_fp", 8): "mxfp8-quantized",
        ("nv_fp", 4): "nvfp4-pack-quantized",
    }
    found = next((name for (start, width), name in formats.items() if kind.startswith(start) and bits == width), None)
    if found is None:
        refuse("quantization_config.data_type", f"{kind} of {bits} bits", "mx_fp of 4 or 8 bits or nv_fp of 4 bits")
    strategy = "tensor_group" if kind.startswith("nv_fp") else "group"
    size = parse_group_size(raw)

    def numbers(width: int, dynamic: bool | str) -> dict[str, Any]:
        said = {"num_bits": width, "type": "float", "symmetric": True, "strategy": strategy, "group_size": size}
        return said | {"dynamic": dynamic}

    act_bits = optional_integer(raw, "act_bits") or _PLAIN_BITS
    activations = None
    if act_bits < _PLAIN_BITS:
        activations = numbers(act_bits, "local" if strategy == "tensor_group" else True)
    group = {"targets": ["Linear"], "weights": numbers(bits or 0, False), "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": found,
        "config_groups": {"group_0": group | {"format": found}},
        "ignore": ["lm_head", *_left_plain(raw)],
    }


def _left_plain(raw: RawConfig) -> list[str]:
    """Modules that `extra_config` gives 16 bits; any other entry is refused where another method's words are used."""
    names = []
    for key, changes in table(raw, "extra_config").items():
        is_plain = isinstance(changes, dict) and changes.get("bits") == _PLAIN_BITS
        if not is_plain or _is_pattern(key):
            refuse(
                "quantization_config.extra_config", {key: changes}, f"names of modules of 16 bits with {layout_of(raw)}"
            )
        names.append(key)
    return names


def _module_rules(raw: RawConfig, rule: Rule) -> ModuleRules:
    by_name, by_pattern = {}, []
    for key, changes in table(raw, "extra_config").items():
        where = f"quantization_config.extra_config[{key!r}]"
        if not isinstance(changes, dict):
            refuse(where, changes, "an object")
        _require_runnable(changes, where)
        changed = _rule(changes, where, rule)
        if _is_pattern(key):
            by_pattern.append((parse_pattern(key, "quantization_config.extra_config"), changed))
        else:
            by_name[key] = changed
    return ModuleRules(rule, by_name, tuple(by_pattern), _blocks(raw))


def _is_pattern(key: str) -> bool:
    return not _PATTERN_MARKS.isdisjoint(key)


def _rule(raw: RawConfig, where: str, default: Rule | None) -> Rule | None:
    """How modules are stored that a config, or an entry of `extra_config`, is about; None = not quantized."""
    bits, size = default and default.bits, default and default.group_size
    if raw.get("bits") is not None and raw["bits"] == _PLAIN_BITS:
        return None
    changes = {key: raw[key] for key in ("bits", "group_size") if raw.get(key) is not None}
    if isinstance(changes.get("group_size"), list):
        refuse(
            f"{where}.group_size", changes["group_size"], "-1 or a positive integer with integers: they have no blocks"
        )
    return Rule(parse_bits(changes, bits), parse_group_size(changes, size))


def _require_runnable(raw: RawConfig, where: str) -> None:
    """Only weights are quantized, and to integers."""
    kind = text(raw, "data_type", "int")
    if not kind.startswith("int") and raw.get("bits") != _PLAIN_BITS:
        refuse(f"{where}.data_type", kind, "int with this packing_format")
    act_bits = optional_integer(raw, "act_bits")
    if act_bits is not None and act_bits < _PLAIN_BITS:
        refuse(f"{where}.act_bits", act_bits, f"{_PLAIN_BITS}: activations beside integers stay as they are")
    if raw.get("super_bits") is not None:
        refuse(f"{where}.super_bits", raw["super_bits"], "absent: scales that are quantized themselves cannot be read")


def _blocks(raw: RawConfig) -> tuple[str, ...]:
    """Prefixes of modules that are quantized, however nested; none = all modules."""
    key = "block_name_to_quantize" if raw.get("block_name_to_quantize") is not None else "to_quant_block_names"
    found: list[str] = []

    def collect(value: object) -> None:
        if isinstance(value, str):
            found.extend(name.strip() for name in value.split(",") if name.strip())
        elif isinstance(value, list):
            for each in value:
                collect(each)
        elif value is not None:
            refuse(f"quantization_config.{key}", raw[key], "names of blocks")

    collect(raw.get(key))
    return tuple(found)
