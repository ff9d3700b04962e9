"""`Device`: what a choice among implementations may look at, at trace time.

The device that is traced *for*, which need not be there: inside `compiling_for(...)` it is one that this machine lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
from jax.sharding import AbstractDevice, AbstractMesh

# Words in a device's name -> compute capability, for devices that are only named (ahead-of-time compilation).
_CAPABILITIES: tuple[tuple[str, tuple[int, int]], ...] = (
    (r"H100|H200|H800|H20\b|GH200", (9, 0)),
    (r"B200|B100|GB200", (10, 0)),
    (r"A100|A800|A30\b", (8, 0)),
    (r"A10\b|A40\b|RTX 30|A6000", (8, 6)),
    (r"L4\b|L40|RTX 40|RTX 6000 Ada", (8, 9)),
)


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        platform: "cpu", "gpu" or another of JAX's platforms.
        kind: its name, such as "NVIDIA H200".
        compute_capability: of an NVIDIA GPU, (9, 0) for Hopper; None if there is none or it is not known.
        num_cores: streaming multiprocessors of a GPU; 1 elsewhere.
    """

    platform: str
    kind: str
    compute_capability: tuple[int, int] | None = None
    num_cores: int = 1

    @property
    def multiplies_e4m3(self) -> bool:
        """Whether it has products of 8-bit floats: NVIDIA's GPUs do from Ada and Hopper on."""
        return self.compute_capability is not None and self.compute_capability >= (8, 9)

    @property
    def slug(self) -> str:
        """Name of its folder of tuned configurations: "nvidia_h200"."""
        return re.sub(r"[^a-z0-9]+", "_", self.kind.lower()).strip("_")


H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
H100 = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)
KNOWN = {"h200": H200, "h100": H100}


def current_device() -> Device:
    """The device that the running trace is for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        capability = _named_capability(abstract.device_kind)
        return Device(abstract.platform, abstract.device_kind, capability, abstract.num_cores or 1)
    device = jax.devices()[0]
    text = getattr(device, "compute_capability", None)  # "9.0"; CPU devices have no such attribute
    capability = tuple(int(part) for part in text.split(".")) if text else None
    return Device(
        device.platform,
        device.device_kind,
        (capability[0], capability[1]) if capability else None,
        getattr(device, "core_count", None) or 1,
    )


def _named_capability(kind: str) -> tuple[int, int] | None:
    return next((capability for words, capability in _CAPABILITIES if re.search(words, kind)), None)


@contextmanager
def compiling_for(device: Device) -> Iterator[None]:
    """What is traced and lowered inside is for this device, there or not. JAX traces anew: the device is a part of the
    key of its caches.
    """
    abstract = AbstractDevice(device_kind=device.kind, num_cores=device.num_cores, platform=device.platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        yield


def hopper_reason(device: Device) -> str | None:
    """None if Mosaic GPU kernels written for Hopper (wgmma, TMA) run on the device, or why not.

    Hopper's tensor cores are programmed by instructions that no other generation has, so "9.0 or newer" is not enough.
    """
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU of compute capability 9.0 (H100, H200), this is {device.platform}"
    if device.compute_capability != (9, 0):
        has = ".".join(map(str, device.compute_capability)) if device.compute_capability else "unknown"
        return f"needs compute capability 9.0 (H100, H200), {device.kind} has {has}"
    return None
