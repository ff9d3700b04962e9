"""What is read from the compilers' output, and what counts as a fault. Needs no GPU package."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from pallas_kernels.aot import launch
from pallas_kernels.aot.report import (
    KernelReport,
    parse_assembler_log,
    parse_disassembly,
    parse_entry,
    parse_thunks,
    violations,
)
from pallas_kernels.mosaic import SMEM_LIMIT

LOG = """\
I0000 subprocess_compilation.cc:1] ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'mosaic_gpu_decode_kernel' for 'sm_90a'
ptxas info    : Function properties for mosaic_gpu_decode_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 648 bytes cmem[0]
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in function 'b'
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
    48 bytes stack frame, 44 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""

SASS = """\
\t.section\t.text.mosaic_gpu_decode_kernel,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, !UPT ;
        /*0020*/              @UP1 UTMALDG.3D [UR8], [UR4] ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
.L_x_1:
\t.section\t.text.b,"ax",@progbits
        /*0000*/                   EXIT ;
"""

GOOD = KernelReport("k", 168, 0, 0, 0, 65536, {"HGMMA.64x128x16.F32.BF16": 4, "UTMALDG.3D": 2})


def test_the_assemblers_log() -> None:
    first, second = parse_assembler_log(LOG)
    assert first == KernelReport("mosaic_gpu_decode_kernel", 168, 0, 0, 0)
    assert (second.registers, second.stack_bytes, second.spill_store_bytes, second.spill_load_bytes) == (
        255,
        48,
        44,
        40,
    )
    assert len(second.warnings) == 1 and "C7512" in second.warnings[0]


def test_the_disassembly() -> None:
    opcodes = parse_disassembly(SASS)
    assert opcodes["mosaic_gpu_decode_kernel"] == {
        "LDC": 1,
        "HGMMA.64x128x16.F32.BF16": 1,
        "HGMMA.64x64x16.F32.BF16": 1,
        "UTMALDG.3D": 1,
    }
    assert opcodes["b"] == {"EXIT": 1}
    report = dataclasses.replace(GOOD, opcodes=opcodes["mosaic_gpu_decode_kernel"])
    assert report.count("HGMMA") == 2 and report.count("IGMMA") == 0


THUNKS = """\
000: kCommandBuffer [source       | next=018 (1)]
    001: kCopy         [source        | next=002 (1)] kCopy
018: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    019: kCustomKernel [source | sink] wrapped_compare_1 grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=029 (1)]
"""

HLO = """\
HloModule jit_f

%fused (p: bf16[64,32]) -> f32[64,32] {
  ROOT %c = f32[64,32]{1,0} convert(%p)
}

ENTRY %main (x: bf16[64,32]) -> (f32[], bf16[2,3]) {
  %x = bf16[64,32]{1,0} parameter(0), sharding={replicated}
  %fusion.1 = (f32[]{:T(128)}, f8e4m3fn[2,3]{1,0}) fusion(%x), kind=kLoop, calls=%fused
  ROOT %t = (f32[], bf16[2,3]{1,0}) tuple(%a, %b)
}
"""


def test_the_outermost_thunks() -> None:
    assert parse_thunks(THUNKS) == ("kCommandBuffer", "kWhile")


def test_what_a_program_materializes() -> None:
    assert parse_entry(HLO) == [
        ("parameter", (("bf16", (64, 32)),)),
        ("fusion", (("f32", ()), ("f8e4m3fn", (2, 3)))),
        ("tuple", (("f32", ()), ("bf16", (2, 3)))),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spill_store_bytes": 4}, "spills registers: 4 bytes stored"),
        ({"spill_load_bytes": 4}, "4 loaded"),
        ({"smem_bytes": SMEM_LIMIT + 1}, "232449 bytes of shared memory"),
        ({"warnings": ("C7512 Potential Performance Loss",)}, "C7512"),
        ({"opcodes": {"HGMMA.64x128x16.F32.BF16": 4}}, "no UTMALDG instruction"),
    ],
)
def test_each_fault_is_found(changes: dict, words: str) -> None:
    wanted = {"smem_limit": SMEM_LIMIT, "instructions": ("HGMMA", "UTMALDG")}
    assert violations([GOOD], **wanted) == []
    [fault] = violations([dataclasses.replace(GOOD, **changes)], **wanted)
    assert words in fault


def test_an_instruction_may_be_in_any_kernel() -> None:
    combine = KernelReport("combine", 40, 0, 0, 0)
    assert violations([combine, GOOD], smem_limit=SMEM_LIMIT, instructions=("HGMMA",)) == []
    assert violations([], smem_limit=SMEM_LIMIT) == ["no Mosaic GPU kernel was compiled"]


def test_a_launched_command_sees_the_settings_and_the_assembler_first(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "tools", lambda: tmp_path)
    code = "import os; print(os.environ['MOSAIC_GPU_DUMP_PTX'], os.environ['PATH']); raise SystemExit(3)"
    assert launch.run_launched([sys.executable, "-c", code]) == 3
    assert capfd.readouterr().out.startswith(f"1 {tmp_path}:/")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PACKAGES", {"a_module_that_is_not_there.inner": ("some-package",)})
    with pytest.raises(launch.AotUnavailableError, match=r"needs some-package: install 'quire-llm\[aot\]'"):
        launch.require_packages()
