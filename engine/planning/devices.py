"""`PlanDevice`: what is known of a device that need not be there. The figures are data: `devices.json`. No jax here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from engine.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True)
class PlanDevice:
    """A device to plan for.

    Attributes:
        key: what users call it.
        name: of the product.
        memory: bytes in all; None = those of this machine.
        bytes_per_s: of its memory, by the datasheet; None = not known.
        flops_per_s: dtype of a product ("bfloat16", "float8" …) -> operations per second, dense, by the datasheet.
        source: where the figures come from.
    """

    key: str
    name: str
    memory: int | None
    bytes_per_s: float | None
    flops_per_s: Mapping[str, float]
    source: str

    @property
    def on_cpu(self) -> bool:
        """Whether the engine's defaults and limits for a CPU apply."""
        return self.key == "cpu"

    @property
    def multiplies_e4m3(self) -> bool:
        """Whether it has products of 8-bit floats."""
        return "float8" in self.flops_per_s

    def rate(self, dtype: str) -> float | None:
        """Operations per second of products in a dtype; None if it has none such."""
        return self.flops_per_s.get(dtype)


def _read() -> dict[str, PlanDevice]:
    text = resources.files("engine.planning").joinpath("devices.json").read_text("utf-8")
    found = {}
    for key, entry in json.loads(text).items():
        memory = entry["memory_mib"]
        found[key] = PlanDevice(
            key,
            entry["name"],
            None if memory is None else memory * MIB,
            entry["bytes_per_s"],
            entry["flops_per_s"],
            entry["source"],
        )
    return found


DEVICES: Mapping[str, PlanDevice] = _read()


def device_of(key: str) -> PlanDevice:
    """The device that is called so.

    Raises:
        ConfigError: none is.
    """
    if key not in DEVICES:
        raise ConfigError(f"device {key!r} is not known; known are {', '.join(DEVICES)}.")
    return DEVICES[key]
