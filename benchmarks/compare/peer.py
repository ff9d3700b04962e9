"""What a peer is: an engine that the driver can start and ask. Standard library only, Python 3.11."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any


class ModelForm(Enum):
    """The form in which a peer wants the model: Quire's own reference, or a Hugging Face directory."""

    REFERENCE = "reference"
    HF_DIRECTORY = "hf-directory"


@dataclass(frozen=True)
class Peer:
    """An engine, and how it is started and asked.

    Attributes:
        name: as in `--peers`.
        about: one line for the report.
        module: of its worker, run with `python -m` in its environment.
        environment: name of its environment (`environments.py`); "" = the driver's own.
        model: the form in which its worker wants the model.
        variants: workload -> the ways in which it is run there; all are measured, the best counts in ratios. A
            workload that is not named is run in one way, "".
        settings: the worker's own, besides the common ones (model, dtype, threads, longest request).
        process_environment: variables to set for the process.
    """

    name: str
    about: str
    module: str
    environment: str
    model: ModelForm
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    process_environment: Mapping[str, str] = field(default_factory=dict)

    def variants_of(self, workload: str) -> tuple[str, ...]:
        """The ways in which a workload is run."""
        return self.variants.get(workload, ("",))

    def without(self, variants: Sequence[str]) -> Peer:
        """The peer with fewer ways; a workload keeps its last one."""
        kept = {name: tuple(w for w in ways if w not in variants) or ways[-1:] for name, ways in self.variants.items()}
        return replace(self, variants=kept)
