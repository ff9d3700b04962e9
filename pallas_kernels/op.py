"""`Op`: one operation with its implementations, and the ladder that chooses among them.

The choice happens at trace time: it depends on static shapes and on the platform alone. "auto" takes the first
implementation whose `supports` has no objection and logs it once, together with the reasons of those it passed over; a
name is strict: it runs or raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pallas_kernels.device import Device, current_device, hopper_reason

logger = logging.getLogger("quire.kernels")

AUTO = "auto"


class UnsupportedImplementationError(ValueError):
    """An implementation was asked for by name and cannot run this problem."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        name: "reference", "xla", "mosaic_gpu" or "mosaic_gpu_simulated" (the same kernel in JAX's simulator of a GPU,
            which runs anywhere, thousands of times slower: for checking).
        functions: what the op is made of, by name (`run`, and `plan` where a step-wide preparation pays).
        supports: gets the problem, returns None or the reason why it can't.
        device_reason: gets the device, returns None or the reason why it can't run there.
    """

    name: str
    functions: Mapping[str, Callable[..., Any]]
    supports: Callable[[Any], str | None]
    device_reason: Callable[[Device], str | None] = lambda device: None

    def refuses(self, problem: Any, device: Device) -> str | None:
        """None, or the reason why it cannot run the problem on the device."""
        return self.device_reason(device) or self.supports(problem)


def mosaic_gpu(
    make: Callable[[bool], Mapping[str, Callable[..., Any]]], supports: Callable[[Any], str | None]
) -> tuple[Implementation, Implementation]:
    """A Hopper kernel and its simulated twin.

    Args:
        make: gets whether to simulate, returns the functions.
        supports: of both.
    """
    return (
        Implementation("mosaic_gpu", make(False), supports, hopper_reason),
        Implementation("mosaic_gpu_simulated", make(True), supports),
    )


@dataclass
class Op:
    """An operation and its implementations, best first; those not `automatic` run only when asked for by name."""

    name: str
    implementations: tuple[Implementation, ...]
    automatic: tuple[str, ...]
    chosen: dict[str, str] = field(default_factory=dict)

    def choose(self, requested: str, problem: Any) -> Implementation:
        """The implementation to run.

        Args:
            requested: "auto" or an implementation's name.
            problem: what `supports` looks at; a frozen dataclass of static values.

        Raises:
            UnsupportedImplementationError: the name is unknown or cannot run the problem, or (auto) none can.
        """
        if requested != AUTO:
            return self._strict(requested, problem)
        device, reasons = current_device(), []
        for implementation in self.implementations:
            if implementation.name not in self.automatic:
                continue
            reason = implementation.refuses(problem, device)
            if reason is None:
                self._log(implementation.name, reasons)
                return implementation
            reasons.append(f"{implementation.name} refused: {reason}")
        raise UnsupportedImplementationError(f"{self.name}: no implementation runs {problem}: {'; '.join(reasons)}")

    def _strict(self, requested: str, problem: Any) -> Implementation:
        for implementation in self.implementations:
            if implementation.name == requested:
                reason = implementation.refuses(problem, current_device())
                if reason is not None:
                    raise UnsupportedImplementationError(f"{self.name}: {requested} cannot run {problem}: {reason}")
                self._log(requested, ["asked for by name"])
                return implementation
        names = ", ".join(i.name for i in self.implementations)
        raise UnsupportedImplementationError(f"{self.name} has no implementation {requested!r}; there are: {names}")

    def _log(self, name: str, reasons: list[str]) -> None:
        text = f"{name} ({'; '.join(reasons)})" if reasons else name
        if self.chosen.get(self.name) != text:
            self.chosen[self.name] = text
            logger.info("%s: %s", self.name, text)
