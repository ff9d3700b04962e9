"""The config of compressed-tensors checkpoints: groups of modules, and how weights and inputs of each are quantized.

Source: the `compressed-tensors` project, `quantization/quant_args.py` and `quant_scheme.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.errors import UnsupportedModelError
from models.families.fields import RawConfig, flag, refuse, strings, table, text
from models.quantization import bitstream
from models.quantization.gptq import parse_pattern
from models.quantization.modules import fused_name

PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
FORMATS = (PACKED, INTEGERS, FLOATS, NVFP4, MXFP4, MXFP8)
_UNNAMED = ("naive-quantized", "mixed-precision")  # what is stored follows from the numbers' type
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group")
_CLASS = "Linear"  # every matrix here is a layer of this class


@dataclass(frozen=True)
class Numbers:
    """How weights, or inputs, are quantized.

    Attributes:
        bits, is_float: of a number.
        symmetric: without zero points.
        strategy: what shares a scale.
        group_size: inputs that do, of groups; -1 otherwise.
        block: (outputs, inputs) that do, of blocks.
        is_dynamic: inputs are measured at run time.
    """

    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    group_size: int = -1
    block: tuple[int, int] = (1, -1)
    is_dynamic: bool = False


@dataclass(frozen=True)
class Scheme:
    """How the modules of one group are stored and met.

    Attributes:
        targets: names, `re:` patterns or classes.
        format: one of `FORMATS`.
        weights: how weights are quantized.
        inputs: how activations are; None = they stay as they are.
    """

    targets: Sequence[str]
    format: str
    weights: Numbers
    inputs: Numbers | None


def matches(module: str, target: str) -> bool:
    """Whether a module is meant by a name or a `re:` pattern: its own, or that of the fused one that it lies in."""
    names = [name for name in (module, fused_name(module)) if name is not None]
    if target.startswith("re:"):
        return any(re.match(target[3:], name) for name in names)
    return target in names


def parse_schemes(raw: RawConfig) -> tuple[Scheme, ...]:
    """Every group of a `quantization_config`.

    Raises:
        UnsupportedModelError: a value that is not supported.
    """
    default = text(raw, "format", "")
    groups = table(raw, "config_groups")
    if not groups:
        raise UnsupportedModelError("config.json: quantization_config.config_groups names no modules.")
    return tuple(_parse_scheme(name, group, default) for name, group in groups.items())


def parse_ignored(raw: RawConfig) -> tuple[str, ...]:
    """Names and `re:` patterns of modules that are not quantized.

    Raises:
        UnsupportedModelError: an invalid pattern.
    """
    ignored = strings(raw, "ignore") or ()
    _check_patterns(ignored, "ignore")
    return ignored


def _parse_scheme(name: str, group: Any, default: str) -> Scheme:
    where = f"config_groups.{name}"
    if not isinstance(group, dict):
        refuse(f"quantization_config.{where}", group, "an object")
    if group.get("output_activations"):
        raise UnsupportedModelError(f"config.json: {where} quantizes output_activations, which is not supported.")
    targets = strings(group, "targets") or ()
    _check_patterns(targets, f"{where}.targets")
    if not table(group, "weights"):
        raise UnsupportedModelError(f"config.json: {where} has no weights: only inputs quantized is not supported.")
    weights = _parse_numbers(group["weights"], f"{where}.weights")
    inputs = None
    if table(group, "input_activations"):
        inputs = _parse_numbers(group["input_activations"], f"{where}.input_activations")
    layout = text(group, "format", "") or default
    if layout in ("", *_UNNAMED):
        layout = _implied(weights, inputs)
    if layout not in FORMATS:
        refuse(f"quantization_config.{where}.format", layout, f"one of {', '.join(FORMATS)}")
    scheme = Scheme(targets, layout, weights, inputs)
    _check(scheme, where)
    return scheme


def _implied(weights: Numbers, inputs: Numbers | None) -> str:
    if weights.is_float:
        return FLOATS if weights.bits == 8 else NVFP4 if weights.strategy == "tensor_group" else MXFP4
    return INTEGERS if weights.bits == 8 and inputs is not None else PACKED


def _parse_numbers(raw: RawConfig, where: str) -> Numbers:
    bits, kind = raw.get("num_bits", 8), text(raw, "type", "int")
    if kind not in ("int", "float"):
        refuse(f"quantization_config.{where}.type", kind, "int or float")
    allowed = (4, 8) if kind == "float" else bitstream.BITS
    if isinstance(bits, bool) or bits not in allowed:
        refuse(f"quantization_config.{where}.num_bits", bits, f"one of {', '.join(map(str, allowed))} for {kind}")
    size = raw.get("group_size")
    strategy = text(raw, "strategy", "tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in _STRATEGIES:
        refuse(f"quantization_config.{where}.strategy", strategy, f"one of {', '.join(_STRATEGIES)}")
    grouped = strategy in ("group", "tensor_group")
    if grouped and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        refuse(f"quantization_config.{where}.group_size", size, "a positive integer for groups")
    return Numbers(
        bits=bits,
        is_float=kind == "float",
        symmetric=flag(raw, "symmetric", True),
        strategy=strategy,
        group_size=int(size) if grouped and size is not None else -1,
        block=_parse_block(raw, where) if strategy == "block" else (1, -1),
        is_dynamic=raw.get("dynamic", False) is not False,  # true, or "local"
    )


def _parse_block(raw: RawConfig, where: str) -> tuple[int, int]:
    block = raw.get("block_structure")
    if isinstance(block, str):  # "128x128"
        block = [int(part) if part.isdigit() else part for part in block.split("x")]
    good = isinstance(block, list) and len(block) == 2 and all(type(part) is int and part > 0 for part in block)
    if not good:
        refuse(f"quantization_config.{where}.block_structure", raw.get("block_structure"), "two positive integers")
    return block[0], block[1]  # type: ignore[index]


def _check(scheme: Scheme, where: str) -> None:
    """Refuse what no product here computes."""
    weights, inputs = scheme.weights, scheme.inputs
    if scheme.format in (NVFP4, MXFP4, MXFP8):
        return  # dequantized, and activations stay as they are
    if weights.is_float != (scheme.format == FLOATS) or (weights.is_float and weights.bits != 8):
        kind = f"{weights.bits}-bit {'float' if weights.is_float else 'int'}"
        raise UnsupportedModelError(f"config.json: {where}: {scheme.format} of {kind} weights is not supported.")
    if inputs is None:
        return
    if (inputs.bits, inputs.is_float) != (8, weights.is_float):
        met = f"{inputs.bits}-bit {'float' if inputs.is_float else 'int'}"
        raise UnsupportedModelError(
            f"config.json: {where}: {scheme.format} weights met by {met} activations are not supported; supported are "
            f"activations of 8-bit {'float' if weights.is_float else 'int'}, and such that stay as they are."
        )
    if not weights.symmetric:
        raise UnsupportedModelError(
            f"config.json: {where}: weights with zero points are not supported where activations are quantized."
        )
    if not inputs.is_dynamic and (inputs.strategy != "tensor" or weights.strategy in ("group", "block")):
        raise UnsupportedModelError(
            f"config.json: {where}: activations with scales measured beforehand must have one for the tensor, and "
            "weights one for each output or one for all."
        )
    if inputs.is_dynamic and not inputs.symmetric:
        raise UnsupportedModelError(f"config.json: {where}: zero points of activations must be measured beforehand.")


def _check_patterns(names: Sequence[str], key: str) -> None:
    for name in names:
        if name.startswith("re:"):
            parse_pattern(name[3:], f"quantization_config.{key}")


def scheme_of(module: str, schemes: Sequence[Scheme], ignored: Sequence[str]) -> Scheme | None:
    """How a module is stored: names go before classes. None if it is plain."""
    if any(matches(module, name) for name in ignored):
        return None
    for scheme in schemes:
        if any(matches(module, target) for target in scheme.targets):
            return scheme
    return next((scheme for scheme in schemes if _CLASS in scheme.targets), None)
