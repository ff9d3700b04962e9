"""What a peer is: an engine that the driver can start and ask. Standard library only, Python 3.11."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any


class ModelForm(Enum):
    """The form in which a peer wants the model: Quire's own reference, a Hugging Face directory, or a GGUF file in the
    dtype of the run or of 8-bit blocks.
    """

    REFERENCE = "reference"
    HF_DIRECTORY = "hf-directory"
    GGUF = "gguf"
    GGUF_Q8_0 = "gguf-q8_0"


@dataclass(frozen=True)
class Precision:
    """What a peer's products are made of, for its share of the roofline, where that is not the dtype of the run.

    Attributes:
        body_bytes, head_bytes: per weight of the layers' matrices and of the output head, scales included where every
            few weights have one; None = as the dtype.
        multiplies_int8: most products are of 8-bit integers.
    """

    body_bytes: float | None = None
    head_bytes: float | None = None
    multiplies_int8: bool = False


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
        unsupported: workload -> why it is not measured there.
        precision: of its products.
        cache_variables: name the directories in which it keeps compiled code; a cold start gets empty ones.
    """

    name: str
    about: str
    module: str
    environment: str
    model: ModelForm
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    process_environment: Mapping[str, str] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    precision: Precision = Precision()
    cache_variables: tuple[str, ...] = ()

    def variants_of(self, workload: str) -> tuple[str, ...]:
        """The ways in which a workload is run; none if it is unsupported."""
        return () if workload in self.unsupported else self.variants.get(workload, ("",))

    def without(self, variants: Sequence[str]) -> Peer:
        """The peer with fewer ways; a workload keeps its last one."""
        kept = {name: tuple(w for w in ways if w not in variants) or ways[-1:] for name, ways in self.variants.items()}
        return replace(self, variants=kept)
