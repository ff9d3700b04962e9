"""`Op`: one operation with its implementations, and the ladder that chooses among them.

The choice happens at trace time: it depends on static shapes and on the platform alone. "auto" takes the first
implementation whose `supports` has no objection and logs it once, together with the reasons of those it passed over; a
name is strict: it runs or raises.

An op that has a GPU kernel also names `gpu_cases`: real workloads (`GpuCase`), each with its search space. From them
alone `pallas_kernels.aot` compiles and judges every kernel without a GPU, and `pallas_kernels.tune` times it on one. An
op's folder defines them once, in `gpu_cases.py`, and hands the function over in its `api.py`:

    OP = Op(name="paged_attention", implementations=..., automatic=..., gpu_cases=gpu_cases)
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
        yields: gets the problem and the device, returns None or the reason why "auto" passes it over although it could
            run: a later one is faster there.
    """

    name: str
    functions: Mapping[str, Callable[..., Any]]
    supports: Callable[[Any], str | None]
    device_reason: Callable[[Device], str | None] = lambda device: None
    yields: Callable[[Any, Device], str | None] = lambda problem, device: None

    def refuses(self, problem: Any, device: Device) -> str | None:
        """None, or the reason why it cannot run the problem on the device."""
        return self.device_reason(device) or self.supports(problem)


def mosaic_gpu(
    make: Callable[[bool], Mapping[str, Callable[..., Any]]],
    supports: Callable[[Any], str | None],
    yields: Callable[[Any, Device], str | None] = lambda problem, device: None,
) -> tuple[Implementation, Implementation]:
    """A Hopper kernel and its simulated twin.

    Args:
        make: gets whether to simulate, returns the functions.
        supports: of both.
        yields: of the kernel; the twin runs only when asked for by name.
    """
    return (
        Implementation("mosaic_gpu", make(False), supports, hopper_reason, yields),
        Implementation("mosaic_gpu_simulated", make(True), supports),
    )


@dataclass(frozen=True)
class GpuCase:
    """A workload that a kernel is compiled, timed and tuned for.

    Attributes:
        name: for people, unique in its op: "decode, 64 x 8192, Llama-3.1-8B, int8 pages".
        key: of its entry in the table of tuned configurations; what `config.py` makes of the problem. Cases with one
            key are tuned together.
        arguments: of the call, pytrees of `jax.ShapeDtypeStruct`. No array is made to describe a case.
        function: (implementation's name, configuration or None) -> the function of `arguments`, not jitted; with None
            it takes the configuration that `choose_config` chooses. Everything static is bound in it.
        sample: (seed) -> arrays as `arguments` describes them: random, never zeros, with indices and lengths that are
            valid and as uneven as the workload is. Called only where the case runs.
        configs: the search space, frozen dataclasses of numbers, strings and booleans that `supports` does not refuse;
            the first is the heuristic's choice.
        instructions: beginnings of the opcodes that the compiled kernel must contain: "HGMMA", "UTMALDG".
        num_bytes: that any implementation must move between memory and chip. num_flops: that it must compute.
        tolerance: largest difference to XLA's result, in units of its root mean square.
        in_table: whether it stands for its like: it is compiled by every run of the tests, and is a line of the table
            in `docs/measurements/`. One per variant of a kernel is enough; the tuner takes all cases.
    """

    name: str
    key: str
    arguments: tuple[Any, ...]
    function: Callable[[str, Any], Callable[..., Any]]
    sample: Callable[[int], tuple[Any, ...]]
    configs: tuple[Any, ...]
    instructions: tuple[str, ...]
    num_bytes: int
    num_flops: int
    tolerance: float = 2e-2
    in_table: bool = True


@dataclass
class Op:
    """An operation and its implementations, best first; those not `automatic` run only when asked for by name.

    Attributes:
        gpu_cases: the workloads of its GPU kernel, none if it has no kernel.
    """

    name: str
    implementations: tuple[Implementation, ...]
    automatic: tuple[str, ...]
    gpu_cases: Callable[[], tuple[GpuCase, ...]] = tuple
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
            refused = implementation.refuses(problem, device)
            reason = refused or implementation.yields(problem, device)
            if reason is None:
                self._log(implementation.name, reasons)
                return implementation
            reasons.append(f"{implementation.name} {'refused' if refused else 'yields'}: {reason}")
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
