"""Compiles the GPU cases that the ops name, and says what is wrong with them; the table of `docs/measurements/`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

from pallas_kernels import mosaic
from pallas_kernels.aot.compiling import Compiled, compile_for
from pallas_kernels.aot.launch import AotUnavailableError
from pallas_kernels.aot.report import KernelReport
from pallas_kernels.device import Device
from pallas_kernels.op import GpuCase, Op
from pallas_kernels.registry import OPS

KERNEL = "mosaic_gpu"
# Beginnings of opcodes that are shown: tensor cores, TMA in and out, matrix loads, single bytes from shared memory.
SHOWN_OPCODES = ("HGMMA", "IGMMA", "QGMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDSM", "LDS.S8", "LDS.U8")
_VERSIONS = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc")


@dataclass(frozen=True)
class Judgement:
    """A case and what is wrong with it.

    Attributes:
        compiled: None if it does not compile; `faults` then says why.
    """

    op: str
    case: GpuCase
    compiled: Compiled | None
    faults: tuple[str, ...]


def judge(device: Device, op: str, case: GpuCase) -> Judgement:
    """Compile a case with the configuration that it would run with.

    Raises:
        AotUnavailableError: nothing can be compiled here.
    """
    try:
        compiled = compile_for(device, case.function(KERNEL, None), *case.arguments)
    except AotUnavailableError:
        raise
    except Exception as error:  # a case that does not compile is a finding: the others have their turn
        return Judgement(op, case, None, (f"{type(error).__name__}: {str(error).strip()[:400]}",))
    return Judgement(op, case, compiled, tuple(compiled.violations(case.instructions)))


def gpu_cases(words: str = "", *, every: bool = False, ops: Sequence[Op] = OPS) -> Iterator[tuple[str, GpuCase]]:
    """(op's name, case) of those whose op or name contains the words.

    Args:
        every: also those that another case stands for.
    """
    for op in ops:
        for case in op.gpu_cases():
            if (every or case.in_table) and (words in op.name or words in case.name):
                yield op.name, case


def check(device: Device, words: str, *, every: bool) -> int:
    """Print a line per case; returns 1 if one has a fault, or if there was none to judge."""
    judged = faulty = 0
    for op, case in gpu_cases(words, every=every):
        judgement = judge(device, op, case)
        judged, faulty = judged + 1, faulty + bool(judgement.faults)
        print(f"{'FAULT' if judgement.faults else 'ok   '} {op}: {case.name}", flush=True)
        for kernel in judgement.compiled.kernels if judgement.compiled else ():
            print(f"        {_summary(kernel)}")
        for fault in judgement.faults:
            print(f"        {fault}")
    print(f"{judged} cases, {faulty} with faults")
    return int(bool(faulty) or not judged)


def _summary(kernel: KernelReport) -> str:
    return (
        f"{kernel.name}: {kernel.registers} registers, {kernel.stack_bytes} B stack, "
        f"{kernel.smem_bytes} B shared memory, {_opcodes(kernel)}"
    )


def _opcodes(kernel: KernelReport) -> str:
    counts = ((opcode, kernel.count(opcode)) for opcode in SHOWN_OPCODES)
    return " ".join(f"{opcode}x{count}" for opcode, count in counts if count) or "none of the shown instructions"


def table(device: Device, words: str, *, every: bool) -> int:
    """Print a Markdown table with a line per kernel; returns 1 if a case has a fault."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _VERSIONS)
    judgements = [judge(device, op, case) for op, case in gpu_cases(words, every=every)]
    print(f"# Kernels compiled for {device.kind}\n")
    print("Made without a GPU by `python -m pallas_kernels.aot table`; nothing here was timed on one.\n")
    print(f"{versions}. A block may use {mosaic.SMEM_LIMIT} bytes of shared memory, a thread 255 registers.\n")
    print("| op | case | kernel | registers | spilled bytes | shared memory | instructions | seconds | faults |")
    print("|---|---|---|---:|---:|---:|---|---:|---|")
    for judgement in judgements:
        for line in _rows(judgement):
            print(f"| {' | '.join(line)} |")
    return int(any(judgement.faults for judgement in judgements))


def _rows(judgement: Judgement) -> Iterator[list[str]]:
    faults = "; ".join(judgement.faults).replace("\n", " ").replace("|", "/") or "none"
    compiled = judgement.compiled
    if compiled is None or not compiled.kernels:
        yield [judgement.op, judgement.case.name, "", "", "", "", "", "", faults]
        return
    for index, kernel in enumerate(compiled.kernels):
        yield [
            judgement.op if index == 0 else "",
            judgement.case.name if index == 0 else "",
            f"`{kernel.name}`",
            str(kernel.registers),
            str(kernel.spill_store_bytes + kernel.spill_load_bytes),
            str(kernel.smem_bytes),
            _opcodes(kernel),
            f"{compiled.lower_s + compiled.compile_s:.1f}" if index == 0 else "",
            faults if index == 0 else "",
        ]
