"""Part `environment`: what this machine is and what it reaches at best; the denominators of all other parts."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.gpu import torch_ops
from benchmarks.gpu.part import Case, Context, Part, Record, Records, Skip
from benchmarks.gpu.report import Table
from benchmarks.gpu.target_config import differences
from benchmarks.gpu.timing import measure, noise
from pallas_kernels.device import current_device
from serving.bench.machine import machine

COPY_BYTES, SMOKE_COPY_BYTES = 2 << 30, 1 << 16
SQUARE, SMOKE_SQUARE = 8192, 64
JAX_DTYPES = {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "int8": "int8"}
SMI_FIELDS = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,"
    "clocks_throttle_reasons.active,memory.total,memory.used,ecc.mode.current,mig.mode.current"
)
PACKAGES = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda13-pjrt", "torch", "triton")
TARGETS = "targets"  # folder of pallas_kernels with the descriptions that ahead-of-time compilation uses
DUMPING = "dumped_for_its_target"  # name of a function, hence of its module


def _cases(smoke: bool) -> list[Case]:
    dtypes = list(JAX_DTYPES)
    return [
        Case("machine", {"kind": "machine"}),
        Case("clocks", {"kind": "clocks"}),
        Case("target config", {"kind": "target"}),
        Case("copy, jax", {"kind": "copy", "by": "jax"}),
        Case("copy, torch", {"kind": "copy", "by": "torch"}),
        *(Case(f"matmul {d}, jax", {"kind": "matmul", "by": "jax", "dtype": d}, 120.0) for d in dtypes),
        *(Case(f"matmul {d}, torch", {"kind": "matmul", "by": "torch", "dtype": d}, 120.0) for d in dtypes),
        Case("clocks after load", {"kind": "clocks"}),
    ]


def _run(case: Case, context: Context) -> Iterator[Record]:
    by = case.arguments.get("by")
    match case.arguments["kind"]:
        case "machine":
            yield _machine()
        case "clocks":
            yield {"nvidia_smi": _nvidia_smi()}
        case "target":
            yield from _target(context)
        case "copy":
            yield _copy(by, context.smoke)
        case "matmul":
            yield _matmul(by, case.arguments["dtype"], context.smoke)


def _machine() -> Record:
    device, versions = jax.devices()[0], {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    stats = device.memory_stats() or {}
    flags = {
        name: "PATH" if os.sep in value else value  # results are published
        for name, value in os.environ.items()
        if name.startswith(("XLA_", "JAX_", "CUDA_VISIBLE", "NVIDIA_TF32"))
    }
    return {
        "machine": machine(),
        "versions": versions,
        "device": str(current_device()),
        "memory_limit_bytes": stats.get("bytes_limit"),
        "platform_version": getattr(device.client, "platform_version", ""),
        "environment": flags,
    }


def _nvidia_smi() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        raise Skip("there is no nvidia-smi")
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise Skip(f"nvidia-smi: {(done.stderr or done.stdout).strip()[:200]}")
    values = done.stdout.splitlines()[0].split(",")
    return dict(zip(SMI_FIELDS.split(","), (value.strip() for value in values), strict=False))


def _target(context: Context) -> Iterator[Record]:
    """Compile something and look at the description that XLA writes down with it."""
    script = (
        f"import jax, jax.numpy as jnp\ndef {DUMPING}(x): return x * 2\n"
        f"jax.jit({DUMPING})(jnp.ones(8)).block_until_ready()"
    )
    with tempfile.TemporaryDirectory() as directory:
        # In a process of its own: the flags must be there before jax is imported.
        dump = f"--xla_dump_to={directory} --xla_dump_hlo_module_re=.*{DUMPING}.*"
        variables = dict(os.environ) | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip()}
        subprocess.run([sys.executable, "-c", script], env=variables, check=True, timeout=50)
        found = sorted(Path(directory).glob("*gpu_target_config*"))
        if not found:
            raise Skip(f"XLA wrote no GPU target config ({jax.devices()[0].platform})")
        real = found[0].read_text(encoding="utf-8")
    (context.out / "target_config.txtpb").write_text(real, encoding="utf-8")
    folder = resources.files("pallas_kernels") / TARGETS
    files = [file for file in folder.iterdir() if file.name.endswith("txtpb")] if folder.is_dir() else []
    if not files:
        yield {"target": "target_config.txtpb", "assumed": None, "differences": []}
    for file in sorted(files, key=lambda file: file.name):
        yield {"assumed": file.name, "differences": differences(file.read_text(encoding="utf-8"), real)}


def _copy(by: str | None, smoke: bool) -> Record:
    size = SMOKE_COPY_BYTES if smoke else COPY_BYTES
    if by == "torch":
        times = torch_ops.copy(size)
    else:
        numbers = noise((size // 2,), "bfloat16", 0)
        add = jax.jit(lambda x: x + 1)
        times = measure(lambda: add(numbers), smoke=smoke)
    return {"by": by, "bytes_per_s": 2 * size / times.min_s, **times.as_record()}


def _matmul(by: str | None, dtype: str, smoke: bool) -> Record:
    n = SMOKE_SQUARE if smoke else SQUARE
    if by == "torch":
        times = torch_ops.matmul(dtype, n, n, n)
    else:
        x, weight = (noise((n, n), JAX_DTYPES[dtype], seed) for seed in (0, 1))
        out = jnp.int32 if dtype == "int8" else jnp.bfloat16
        product = jax.jit(lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=out))
        times = measure(lambda: product(x, weight), smoke=smoke)
    return {"by": by, "dtype": dtype, "flops_per_s": 2 * n**3 / times.min_s, **times.as_record()}


def _report(records: Records) -> str:
    texts, ceilings = [], Table("ceiling", "by", "best", "median")
    for r in records["environment"]:
        if "machine" in r:
            versions = r["machine"]["versions"] | r["versions"]
            texts.append(f"{r['device']}; {', '.join(f'{name} {version}' for name, version in versions.items())}.")
        elif "nvidia_smi" in r:
            texts.append(f"{r['case']}: " + ", ".join(f"{name} {value}" for name, value in r["nvidia_smi"].items()))
        elif "differences" in r:
            texts.append(_target_text(r))
        elif "bytes_per_s" in r:
            median = r["bytes_per_s"] * r["us_min"] / r["us"]
            ceilings.add("copy, read + write", r["by"], f"{r['bytes_per_s'] / 1e12:.3f} TB/s", f"{median / 1e12:.3f}")
        elif "flops_per_s" in r:
            median = r["flops_per_s"] * r["us_min"] / r["us"]
            what = f"matmul {r['dtype']}"
            ceilings.add(what, r["by"], f"{r['flops_per_s'] / 1e12:.1f} TFLOP/s", f"{median / 1e12:.1f}")
    return "\n\n".join([*texts, ceilings.markdown()])


def _target_text(record: Record) -> str:
    if record["assumed"] is None:
        return "The device's target config is in `target_config.txtpb`; this tree has none to compare it with."
    differing = Table("field", f"assumed ({record['assumed']})", "real")
    for row in record["differences"]:
        differing.add(*row)
    return f"Target config against {record['assumed']}:\n\n" + (
        differing.markdown() if record["differences"] else "no differences."
    )


PART = Part(
    "environment",
    "machine, versions, target config, ceilings",
    _cases,
    _run,
    _report,
    environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
)
