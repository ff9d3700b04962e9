"""Compiles for a GPU that is not there, and reports what came out."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import dialect  # pyright: ignore[reportPrivateImportUsage]
from jax.interpreters import mlir
from jaxlib.mlir import ir

from pallas_kernels import mosaic
from pallas_kernels.aot import report
from pallas_kernels.aot.launch import AotUnavailableError, require_packages, tools
from pallas_kernels.aot.report import KernelReport, MemoryReport
from pallas_kernels.device import Device, compiling_for


@dataclass(frozen=True)
class Compiled:
    """A program compiled for a GPU that is not there.

    Attributes:
        device: that it is for.
        kernels: those of Mosaic GPU, in the order of their compilation, each once.
        memory: of one execution.
        lower_s, compile_s: seconds to trace and lower, and to compile.
        thunks: kinds of what the host launches one after the other, if it was asked for: ("kCommandBuffer",) is a
            program that runs as one CUDA graph; a "kWhile" beside it waits for the device at each turn.
        executable: for `as_text()` and cost analysis; it cannot run here.
    """

    device: Device
    kernels: tuple[KernelReport, ...]
    memory: MemoryReport
    lower_s: float
    compile_s: float
    executable: Any
    thunks: tuple[str, ...] = ()

    def violations(self, instructions: Iterable[str] = ()) -> list[str]:
        """What is wrong with its kernels, see `report.violations`."""
        return report.violations(self.kernels, smem_limit=mosaic.SMEM_LIMIT, instructions=instructions)


def compile_for(
    device: Device,
    function: Callable[..., Any],
    *arguments: Any,
    compiler_options: Mapping[str, Any] | None = None,
    **static: Any,
) -> Compiled:
    """Compile a function of arrays for a device that need not be there.

    Args:
        device: one that `pallas_kernels/targets/` describes.
        function: not jitted.
        arguments: pytrees of `jax.ShapeDtypeStruct`.
        compiler_options: of XLA, such as `{"xla_gpu_autotune_level": 0}`.
        static: arguments that are bound as they are.

    Raises:
        AotUnavailableError: packages, the device's description or the process' environment are missing.
        Whatever tracing or compiling raises; with what the compilers printed as a note.
    """
    bound = jax.jit(lambda *arrays: function(*arrays, **static))
    return compile_lowered(device, lambda: bound.lower(*arguments), compiler_options=compiler_options)


def compile_lowered(
    device: Device,
    lower: Callable[[], jax.stages.Lowered],
    *,
    compiler_options: Mapping[str, Any] | None = None,
    with_thunks: bool = False,
) -> Compiled:
    """As `compile_for`, of what `lower` traces and lowers, which may have donated arguments.

    Args:
        with_thunks: whether to find out how the host launches it.

    One at a time in a process: it reads what the compilers write to the standard streams.
    """
    require_packages()
    with compiling_for(device), jax.default_device(_described(device)):
        begin = time.monotonic()
        lowered = lower()
        lowered_at = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, _captured_output() as captured:
            options = {**(compiler_options or {}), **({"xla_dump_to": folder} if with_thunks else {})}
            try:
                executable = lowered.compile(compiler_options=options)
            except Exception as error:
                error.add_note(captured()[-4000:])
                raise
            compiled_at = time.monotonic()
            thunks = _thunks(Path(folder)) if with_thunks else ()
    kernels = _reports(captured(), _launches(lowered))
    stats: Any = executable.memory_analysis()
    memory = MemoryReport(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
    )
    return Compiled(device, kernels, memory, lowered_at - begin, compiled_at - lowered_at, executable, thunks)


def _thunks(folder: Path) -> tuple[str, ...]:
    """Of the program whose compilation XLA dumped there."""
    [file] = folder.glob("*.thunk_sequence_after_thunk_passes.txt")
    return report.parse_thunks(file.read_text(encoding="utf-8"))


@cache
def _described(device: Device) -> Any:
    """The device as the compiler sees it.

    Raises:
        AotUnavailableError: there is no description of it.
    """
    folder = resources.files("pallas_kernels") / "targets"
    file = folder / f"{device.slug}.txtpb"
    if not file.is_file():
        known = ", ".join(sorted(f.name.removesuffix(".txtpb") for f in folder.iterdir() if f.name.endswith(".txtpb")))
        raise AotUnavailableError(f"no description of {device.kind} in pallas_kernels/targets; there are: {known}")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=device.slug, topology="1x1x1", target_config=file.read_text(encoding="utf-8")
    )
    return topology.devices[0]


@dataclass(frozen=True)
class _Launch:
    """A kernel's launch in a lowered program: its name, and the shared memory of a block."""

    name: str
    smem_bytes: int


def _launches(lowered: jax.stages.Lowered) -> list[_Launch]:
    """The launches of Mosaic GPU's kernels, each distinct kernel once, in the order of the program."""
    modules, program = {}, lowered.compiler_ir()
    assert program is not None, "a program that was just lowered has its text"
    for operation in _operations(program.operation):
        target = operation.attributes["call_target_name"] if operation.name == "stablehlo.custom_call" else None
        if target is not None and ir.StringAttr(target).value.startswith("mosaic_gpu"):
            config = ir.DictAttr(operation.attributes["mhlo.backend_config"])
            modules[ir.StringAttr(config["kernel_hash"]).value_bytes] = ir.StringAttr(config["module"]).value_bytes
    return [_launch(module) for module in modules.values()]


def _launch(module: bytes) -> _Launch:
    with mlir.make_ir_context() as context:
        context.allow_unregistered_dialects = True  # the serialized dialect is one of its own
        dialect.register_dialect(context)
        parsed = ir.Module.parse(module)
        launch = next(op for op in _operations(parsed.operation) if op.name.endswith("gpu.launch"))
        smem_bytes = ir.IntegerAttr(launch.operands[7].owner.attributes["value"]).value
        return _Launch(ir.StringAttr(parsed.operation.attributes["sym_name"]).value, smem_bytes)


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _operations(inner.operation)


def _reports(dump: str, launches: Sequence[_Launch]) -> tuple[KernelReport, ...]:
    """What was printed while compiling, and what was known before, put together by name and order.

    Raises:
        AotUnavailableError: the process does not print what is needed.
    """
    printed = report.split_dump(dump)
    if len(printed) != len(launches):
        raise AotUnavailableError(
            f"{len(launches)} Mosaic GPU kernels were compiled and {len(printed)} reported: start this process with "
            "`python -m pallas_kernels.aot run COMMAND`"
        )
    left, found = list(launches), []
    for ptx, log in printed:
        [kernel] = report.parse_assembler_log(log)
        launch = next(launch for launch in left if kernel.name.startswith(launch.name))
        left.remove(launch)
        found.append(replace(kernel, smem_bytes=launch.smem_bytes, opcodes=_opcodes(ptx, kernel)))
    return tuple(found)


def _opcodes(ptx: str, kernel: KernelReport) -> Mapping[str, int]:
    """Assemble a kernel again and take it apart. (Mosaic GPU can do so itself, and leaves files behind.)

    Raises:
        AotUnavailableError: Mosaic GPU found another assembler.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        log = _tool("ptxas", "-arch=sm_90a", "--warn-on-spills", "-v", str(source), "-o", str(binary))
        [again] = report.parse_assembler_log(log)
        if (again.registers, again.spill_store_bytes) != (kernel.registers, kernel.spill_store_bytes):
            raise AotUnavailableError(
                f"Mosaic GPU did not assemble with {tools()}: start this process with "
                "`python -m pallas_kernels.aot run COMMAND`"
            )
        return report.parse_disassembly(_tool("nvdisasm", "-c", str(binary)))[kernel.name]


def _tool(name: str, *arguments: str) -> str:
    command = [str(tools() / name), *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


@contextmanager
def _captured_output() -> Iterator[Callable[[], str]]:
    """What is written to the standard streams inside, by native code too; the function gives it, also afterwards."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        text: list[str] = []

        def read() -> str:
            if text:
                return text[0]
            file.seek(0)
            return file.read().decode(errors="replace")

        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield read
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, stream in zip(saved, (1, 2), strict=True):
                os.dup2(descriptor, stream)
                os.close(descriptor)
            text.append(read())
