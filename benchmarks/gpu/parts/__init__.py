"""The parts of a session, in the order in which they are run: what all others need first, what is nice to have last."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from benchmarks.gpu.part import Case, Context, Part, Record

ORDER = ("environment", "numerics", "attention", "matmul", "step", "engine", "start", "graphs", "tune")


def load(module: str, name: str) -> Part:
    """The part of a module. One that cannot be imported on this machine (the engine needs more packages than kernels
    do) becomes a part that fails and says why: the others can be measured all the same.
    """
    try:
        return importlib.import_module(module).PART
    except ImportError as caught:
        error = caught

    def run(case: Case, context: Context) -> Iterator[Record]:
        del case, context
        raise error

    return Part(name, "cannot be imported", lambda smoke: [Case("import")], run, lambda records: "")


PARTS: dict[str, Part] = {name: load(f"{__name__}.{name}", name) for name in ORDER}
