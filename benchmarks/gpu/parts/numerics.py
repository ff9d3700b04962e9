"""Part `numerics`: does every implementation give on this device what the reference gives?"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu import kernels
from benchmarks.gpu.part import Case, Context, Part, Record, Records, Skip
from benchmarks.gpu.report import Table
from pallas_kernels.op import Op, UnsupportedImplementationError
from pallas_kernels.registry import OPS

TIMEOUT_S = 45.0  # compiling takes a few seconds; a kernel that waits for itself never ends


def _cases(smoke: bool) -> list[Case]:
    pairs = [(op, name) for op in OPS for name in kernels.implementations(op, smoke=smoke)]
    pairs.sort(key=lambda pair: pair[1] == "xla")  # kernels first: that is what a GPU is needed for
    return [case for op, name in pairs for case in _cases_of(op, name, smoke)]


def _cases_of(op: Op, implementation: str, smoke: bool) -> list[Case]:
    # XLA's result is what a GPU case is compared with.
    large = [case.name for case in op.gpu_cases() if case.in_table and not smoke and implementation != "xla"]
    names = [*((name, "gpu") for name in large), *((name, "small") for name in kernels.small_cases(op, smoke=smoke))]
    return [
        Case(
            f"{op.name}, {implementation}: {name or 'unknown'}",
            {"op": op.name, "implementation": implementation, "input": name, "size": size},
            TIMEOUT_S,
        )
        for name, size in names or [(None, "small")]
    ]


def _run(case: Case, context: Context) -> Iterator[Record]:
    wanted = case.arguments
    op, implementation = kernels.op_named(wanted["op"]), wanted["implementation"]
    if wanted["input"] is None:
        raise Skip(f"this script has no inputs for the op {op.name}")
    kernels.require(op, implementation)
    try:
        if wanted["size"] == "small":
            comparison = kernels.small_cases(op, smoke=context.smoke)[wanted["input"]](implementation)
        else:
            comparison = kernels.compare_gpu_case(op, kernels.gpu_case(op, wanted["input"]), implementation)
    except UnsupportedImplementationError as error:
        raise kernels.refuse(op, implementation, error) from error
    record = comparison.as_record()
    yield {**wanted, **record}
    if not record["ok"]:
        raise ArithmeticError(f"off by {record['error']:.3g} times what is allowed")


def _report(records: Records) -> str:
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in records["numerics"]:
        groups.setdefault((r["op"], r["implementation"]), []).append(r)
    summary = Table("op", "implementation", "cases", "outside tolerance", "worst (1 = at the edge)")
    wrong = Table("op", "implementation", "case", "times the tolerance", "largest difference", "not finite")
    for (op, implementation), results in groups.items():
        bad = [r for r in results if not r["ok"]]
        summary.add(op, implementation, len(results), len(bad), f"{max(r['error'] for r in results):.3f}")
        for r in bad:
            difference = f"{r['max_difference']:.3g}"
            wrong.add(op, implementation, r["input"], f"{r['error']:.3g}", difference, r["not_finite"])
    has_wrong = any(not r["ok"] for r in records["numerics"])
    return summary.markdown() + (f"\n\n**Outside tolerance:**\n\n{wrong.markdown()}" if has_wrong else "")


PART = Part(
    "numerics",
    "every implementation against the reference",
    _cases,
    _run,
    _report,
    environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
)
