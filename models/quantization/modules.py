"""Which modules a config leaves as they are: lists of names, of parts of names, or of wildcards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

# Modules that other engines hold as one, and that configs may therefore name as one.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Excluded:
    """Modules that are not quantized.

    Attributes:
        names: a module's own name, its last parts ("lm_head", "mlp.gate_proj"), a module that it lies in
            ("model.layers.0"), or one of them with wildcards ("*self_attn*").
    """

    names: Sequence[str] = ()

    def __contains__(self, module: str) -> bool:
        return any(_matches(module, name) for given in self.names for name in _unfused(given))


def _matches(module: str, name: str) -> bool:
    if any(mark in name for mark in "*?["):
        return fnmatchcase(module, name)
    return re.search(rf"(^|\.){re.escape(name)}$|^{re.escape(name)}\.", module) is not None


def fused_name(module: str) -> str | None:
    """What a module is called where others hold it as one with its neighbours: "mlp.gate_up_proj" of "mlp.up_proj"."""
    path, dot, last = module.rpartition(".")
    return next((f"{path}{dot}{fused}" for fused, parts in _FUSED.items() if last in parts), None)


def _unfused(name: str) -> tuple[str, ...]:
    for fused, parts in _FUSED.items():
        if name == fused or name.endswith(f".{fused}"):
            return tuple(name.removesuffix(fused) + part for part in parts)
    return (name,)
