"""Every op's GPU cases compile for an H200 without a fault."""

from __future__ import annotations

import pytest

from pallas_kernels.aot.check import gpu_cases, judge
from pallas_kernels.device import H200
from pallas_kernels.op import GpuCase
from pallas_kernels.registry import OPS

CASES = list(gpu_cases())


@pytest.mark.parametrize(("op", "case"), CASES, ids=[f"{op}: {case.name}" for op, case in CASES])
def test_kernel(op: str, case: GpuCase) -> None:
    judgement = judge(H200, op, case)
    assert judgement.faults == ()


def test_every_op_with_a_kernel_names_its_cases() -> None:
    for op in OPS:
        has_kernel = any(implementation.name == "mosaic_gpu" for implementation in op.implementations)
        assert has_kernel == bool(op.gpu_cases()), op.name
