"""`Part` and `Case`: one question to the machine, and the pieces in which it is answered. No jax here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""One result: values that JSON has."""

Records = Mapping[str, Sequence[Record]]
"""Part name -> its results, of all its cases."""


class Skip(Exception):
    """A case cannot be measured on this machine or with this tree; the text says why."""


@dataclass(frozen=True)
class Context:
    """Where a part runs.

    Attributes:
        out: folder of the results.
        smoke: tiny shapes on any device, to see that the code runs. Its times mean nothing.
    """

    out: Path
    smoke: bool


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: unique in its part.
        arguments: for the part's `run`.
        timeout_s: after so long it is taken for hung, and killed.
        own_process: shares its process with no other case.
        environment: variables of its process; needs `own_process`. XLA_FLAGS are added to those already set.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0
    own_process: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.environment and not self.own_process:
            raise ValueError(f"{self.name}: variables are those of a process, so it needs its own")


@dataclass(frozen=True)
class Part:
    """One question.

    Attributes:
        name: of its files and on the command line.
        about: one line.
        cases: gets whether it is a smoke run; the same list each time, whatever the machine.
        run: measures a case; yields results as they come.
        report: Markdown of its own results, and of other parts' (ceilings).
        limit_s: of all its cases together; what is left is for `--resume`.
        environment: variables of its processes.
    """

    name: str
    about: str
    cases: Callable[[bool], Sequence[Case]]
    run: Callable[[Case, Context], Iterable[Record]]
    report: Callable[[Records], str]
    limit_s: float = 450.0
    environment: Mapping[str, str] = field(default_factory=dict)
