"""AutoRound checkpoints: `quant_method: auto-round`. Layouts are those of others; how modules are named differs.

    auto_round:auto_gptq   GPTQ's, zero points minus one, scales of either sign
    auto_round             GPTQ's, zero points as they are
    auto_round:auto_awq    AWQ's

Source: Cheng et al. 2023 (arXiv 2309.05516) for the method; auto-round's files for names.
"""

from __future__ import annotations

from typing import Any

from models.errors import UnsupportedModelError
from models.families.fields import RawConfig, refuse, table, text
from models.quantization.awq import BITS as AWQ_BITS
from models.quantization.awq import Awq
from models.quantization.format import WeightFormat
from models.quantization.gptq import Gptq
from models.quantization.rules import PLAIN_BITS, NamedRules, Rule, parse_bits, parse_group_size, parse_pattern

NAME = "auto-round"
_GPTQ, _RAW, _AWQ = "auto_round:auto_gptq", "auto_round", "auto_round:auto_awq"


def parse_auto_round(raw: RawConfig) -> WeightFormat:
    """The format that a config's `quantization_config` with `quant_method: auto-round` describes.

    Raises:
        UnsupportedModelError: a value that is not supported.
    """
    if text(raw, "data_type", "int") not in ("int", "int_sym", "int_asym"):
        refuse("quantization_config.data_type", raw["data_type"], "int for AutoRound")
    act_bits = raw.get("act_bits")
    if act_bits is not None and act_bits < PLAIN_BITS:
        refuse("quantization_config.act_bits", act_bits, "16 or more: activations stay as they are")
    rule = Rule(parse_bits(raw), parse_group_size(raw))
    named = {
        name: rule_of
        for name, change in table(raw, "extra_config").items()
        if (rule_of := _changed(name, change, rule))
    }
    for name in named:
        if any(mark in name for mark in "*+?^$()[]{}|"):
            parse_pattern(name, "quantization_config.extra_config")
    rules = NamedRules(rule, named)
    layout = text(raw, "packing_format", _GPTQ)
    if layout == _AWQ:
        wrong = next((r.bits for r in (rule, *named.values()) if r.bits != AWQ_BITS), None)
        if wrong is not None:
            raise UnsupportedModelError(f"config.json: {_AWQ} has {AWQ_BITS} bits, and quantization_config {wrong}.")
        return Awq(NAME, rules)
    if layout in (_GPTQ, _RAW) or layout.startswith("auto_round:gptq"):
        return Gptq(NAME, rules, minus_one=layout != _RAW)
    refuse("quantization_config.packing_format", layout, f"{_GPTQ}, {_RAW} or {_AWQ}")


def _changed(name: str, change: Any, rule: Rule) -> Rule | None:
    """The rule of modules of that name; None if they are plain."""
    if not isinstance(change, dict):
        refuse(f"quantization_config.extra_config[{name!r}]", change, "an object")
    bits = change.get("bits", rule.bits)
    if isinstance(bits, int) and bits >= PLAIN_BITS:
        return None
    return Rule(parse_bits(change, rule.bits), parse_group_size(change, rule.group_size))
