"""Compiles for a GPU that is not there, and judges the machine code: the last proof of a kernel before a GPU runs it.

The problem: the simulator checks numbers and order, but knows no registers, no tensor cores and no speed. The idea: XLA
compiles for a description of a device (`pallas_kernels/targets/*.txtpb`) as well as for the device, down to the code
that the GPU executes, and the assembler says what became of each kernel.

    from pallas_kernels.aot import compile_for
    compiled = compile_for(device.H200, function, jax.ShapeDtypeStruct((64, 4096), "bfloat16"))
    assert not compiled.violations(["HGMMA", "UTMALDG"])

It needs the packages of `quire-llm[aot]` and a process that was started for it: `python -m pallas_kernels.aot run
COMMAND` starts one; `python -m pallas_kernels.aot check` and `table` judge the kernels of all ops.

Deliberately not here: running anything, and judging what XLA itself compiles, which picks its matrix products by timing
them on the device.
"""

from pallas_kernels.aot.compiling import Compiled, compile_for, compile_lowered
from pallas_kernels.aot.launch import SETTINGS, AotUnavailableError, missing_packages, relaunch
from pallas_kernels.aot.report import KernelReport, MemoryReport

__all__ = [
    "SETTINGS",
    "AotUnavailableError",
    "Compiled",
    "KernelReport",
    "MemoryReport",
    "compile_for",
    "compile_lowered",
    "missing_packages",
    "relaunch",
]
