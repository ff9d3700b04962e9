"""Part `matmul`: products with packed weights, from one row to a prompt, beside bf16 and torch's library kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.gpu import kernels, torch_ops
from benchmarks.gpu.part import Case, Context, Part, Record, Records, Skip
from benchmarks.gpu.report import Table, limits_of, percent
from benchmarks.gpu.roofline import floor_s
from benchmarks.gpu.timing import Times, noise, rotations, time_each
from pallas_kernels.matmul import matmul
from pallas_kernels.op import UnsupportedImplementationError
from pallas_kernels.registry import OPS

QUANTIZED = "quantized_matmul"
# Llama-3.1-8B's fused gate/up and its down projection: (K, N). Other layers are in `tune`.
LAYERS, SMOKE_LAYERS = ((4096, 28672), (14336, 4096)), ((64, 96),)
ROWS, SMOKE_ROWS = (1, 8, 16, 32, 64, 128, 2048), (1, 8)


def _cases(smoke: bool) -> list[Case]:
    cases = []
    for k, n in SMOKE_LAYERS if smoke else LAYERS:
        for m in SMOKE_ROWS if smoke else ROWS:
            shape = {"m": m, "k": k, "n": n}
            cases.append(
                Case(f"{m} x {k} x {n}, bf16, xla", {**shape, "what": "dense", "format": "bf16", "by": "xla"}, 45.0)
            )
            cases += [
                Case(f"{m} x {k} x {n}, {d}, torch", {**shape, "what": "torch", "format": d, "by": "torch"}, 45.0)
                for d in torch_ops.DTYPES
            ]
    op = next((op for op in OPS if op.name == QUANTIZED), None)
    shapes = [f"{k}x{n}" for k, n in LAYERS]
    inputs = [case.name for case in (op.gpu_cases() if op else ()) if any(shape in case.name for shape in shapes)]
    if op is None or not inputs:
        return [*cases, Case(QUANTIZED, {"what": QUANTIZED, "input": None, "by": None})]
    for name in inputs[:1] if smoke else inputs:
        cases += [
            Case(f"{name}, {by}", {"what": QUANTIZED, "input": name, "by": by}, 45.0)
            for by in kernels.implementations(op, smoke=False)
        ]
    return cases


def _run(case: Case, context: Context) -> Iterator[Record]:
    wanted = case.arguments
    match wanted["what"]:
        case "dense":
            yield {**wanted, **_dense(wanted["m"], wanted["k"], wanted["n"], context.smoke)}
        case "torch":
            m, k, n = wanted["m"], wanted["k"], wanted["n"]
            times = torch_ops.matmul(wanted["format"], m, k, n)
            item = 2 if wanted["format"] == "bf16" else 1
            yield {**wanted, **_record(times, item * (m * k + n * k) + 2 * m * n, 2 * m * k * n)}
        case _:
            yield {**wanted, **_quantized(wanted["input"], wanted["by"], context.smoke)}


def _record(times: Times, num_bytes: int, flops: int) -> Record:
    return {**times.as_record(), "bytes": num_bytes, "flops": flops}


def _dense(m: int, k: int, n: int, smoke: bool) -> Record:
    num_sets = 2 if smoke else rotations(2 * k * n)
    x, weights = noise((m, k), "bfloat16", 0), [noise((k, n), "bfloat16", seed + 1) for seed in range(num_sets)]
    times = time_each(lambda operands: matmul(*operands), [(x, weight) for weight in weights], smoke=smoke)
    return _record(times, 2 * (m * k + k * n + m * n), 2 * m * k * n)


def _quantized(name: str | None, implementation: str, smoke: bool) -> Record:
    op = kernels.op_named(QUANTIZED)
    if name is None:
        raise Skip(f"{QUANTIZED} has no GPU cases of the layers {LAYERS}")
    if smoke:
        raise Skip("GPU cases are too large for a smoke run")
    kernels.require(op, implementation)
    case = kernels.gpu_case(op, name)
    sets: list[Any] = [jax.device_put(case.sample(seed)) for seed in range(rotations(case.num_bytes))]
    function = case.function(implementation, None)
    try:
        times = time_each(lambda operands: function(*operands), sets, smoke=smoke)
    except UnsupportedImplementationError as error:
        raise kernels.refuse(op, implementation, error) from error
    return _record(times, case.num_bytes, case.num_flops) | {"format": _format(name)}


def _format(name: str) -> str:
    """Which rate of the tensor cores a GPU case can use, from its name: w8a8 kinds compute in 8 bits."""
    if "w8a8" not in name:
        return "bf16"
    return "fp8" if "fp8" in name else "int8"


def _report(records: Records) -> str:
    limits = limits_of(records)
    table = Table("product", "by", "µs (min)", "GB/s", "TFLOP/s", "% of roofline")
    for r in records["matmul"]:
        seconds = r["us"] * 1e-6
        floor = floor_s(limits, r["bytes"], r["flops"], r["format"]) if limits else None
        what = r.get("input") or f"{r['m']} x {r['k']} x {r['n']}, {r['format']}"
        table.add(
            what,
            r["by"],
            f"{r['us']:.1f} ({r['us_min']:.1f})",
            f"{r['bytes'] / seconds / 1e9:,.0f}",
            f"{r['flops'] / seconds / 1e12:.1f}",
            percent(floor, seconds),
        )
    return table.markdown()


PART = Part(
    "matmul",
    "products with packed weights against the roofline",
    _cases,
    _run,
    _report,
    environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
)
