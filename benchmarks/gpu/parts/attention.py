"""Part `attention`: how near paged attention comes to the memory's speed (decode) and the tensor cores' (prefill)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import torch_ops
from benchmarks.gpu.kernels import implementations, op_named, ragged, refuse, require
from benchmarks.gpu.part import Case, Context, Part, Record, Records, Skip
from benchmarks.gpu.report import NOTHING, Table, limits_of, percent
from benchmarks.gpu.roofline import floor_s
from benchmarks.gpu.timing import noise, rotations, time_chain
from pallas_kernels.kv_layout import KVLayout, Pages
from pallas_kernels.op import UnsupportedImplementationError
from pallas_kernels.paged_attention import AttentionProblem, paged_attention, plan_attention

OP_NAME = "paged_attention"
HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16  # Llama-3.1-8B, the engine's default page
DECODE = ((1, 1024), (1, 8192), (1, 32768), (8, 1024), (8, 4096), (32, 1024), (32, 4096), (32, 16384), (128, 1024))
DECODE += ((128, 4096), (256, 1024), (256, 4096))
KV_DTYPES = ("bfloat16", "int8", "float8_e4m3fn")
PREFILL = (512, 2048, 8192, 32768)
SMOKE_DECODE, SMOKE_PREFILL = ((2, 40),), (32,)
TORCH = "torch SDPA, dense"


def _cases(smoke: bool) -> list[Case]:
    cases = []
    names = [name for name in implementations(op_named(OP_NAME), smoke=smoke) if not name.endswith("simulated")]
    for batch, context in SMOKE_DECODE if smoke else DECODE:
        for kv_dtype in KV_DTYPES:
            cases += [_case("decode", batch, context, kv_dtype, name) for name in names]
        cases.append(_case("decode", batch, context, "bfloat16", TORCH))
    for tokens in SMOKE_PREFILL if smoke else PREFILL:
        cases += [_case("prefill", 1, tokens, "bfloat16", name) for name in (*names, TORCH)]
    return cases


def _case(kind: str, batch: int, context: int, kv_dtype: str, implementation: str) -> Case:
    arguments = {"kind": kind, "batch": batch, "tokens": context, "kv_dtype": kv_dtype, "by": implementation}
    return Case(f"{kind} {batch} x {context}, {kv_dtype}, {implementation}", arguments, 45.0)


def _run(case: Case, context: Context) -> Iterator[Record]:
    wanted = case.arguments
    batch, tokens, is_decode = wanted["batch"], wanted["tokens"], wanted["kind"] == "decode"
    if wanted["by"] == TORCH:
        times = torch_ops.attention(batch, 1 if is_decode else tokens, tokens, HEADS, KV_HEADS, HEAD_DIM)
        kv_bytes = 2 * batch * tokens * KV_HEADS * HEAD_DIM * 2
    else:
        op = op_named(OP_NAME)
        require(op, wanted["by"])
        try:
            times, kv_bytes = _time(wanted, is_decode, context.smoke)
        except UnsupportedImplementationError as error:
            raise refuse(op, wanted["by"], error) from error
    pairs = batch * tokens if is_decode else tokens * (tokens + 1) // 2
    yield {**wanted, **times.as_record(), "kv_bytes": kv_bytes, "flops": 4 * HEADS * HEAD_DIM * pairs}


def _time(wanted: Any, is_decode: bool, smoke: bool) -> tuple[Any, int]:
    """Times of one layer's call, the plan made before as for all layers of a step; and the bytes of keys and values."""
    batch, length, implementation = wanted["batch"], wanted["tokens"], wanted["by"]
    num_tokens, each = (batch if is_decode else length), -(-length // PAGE)
    layout = KVLayout(batch * each + 1, KV_HEADS, PAGE, HEAD_DIM, wanted["kv_dtype"])
    if (limit := (jax.devices()[0].memory_stats() or {}).get("bytes_limit")) and layout.page_bytes * (
        layout.num_pages
    ) > 0.8 * limit:
        raise Skip("does not fit")
    tables = np.random.default_rng(0).permutation(batch * each).reshape(batch, each).astype(np.int32) + 1
    batched = ragged([1] * batch if is_decode else [length], [length] * batch, tables)
    problem = AttentionProblem(HEADS, KV_HEADS, HEAD_DIM, PAGE, "bfloat16", wanted["kv_dtype"], implementation)
    plan = jax.jit(lambda batch: plan_attention(batch, num_tokens, problem))(batched)

    def pages(seed: int) -> Pages:
        scales = jnp.full(layout.shape[:4], 1.0 / 127, jnp.float32) if layout.is_quantized else None
        return Pages(noise(layout.shape, layout.dtype, seed), scales)

    def attend(q: jax.Array, pages_and_plan: tuple[Pages, Any]) -> jax.Array:
        # What comes out is the next query: calls cannot overlap, and need nothing between them.
        return paged_attention(q, *pages_and_plan, problem, scale=HEAD_DIM**-0.5)

    num_sets = 2 if smoke else rotations(layout.page_bytes * layout.num_pages)
    sets = [(pages(seed), plan) for seed in range(num_sets)]
    q = noise((num_tokens, HEADS, HEAD_DIM), "bfloat16", 99)
    bytes_per_token = layout.page_bytes // PAGE
    return time_chain(attend, q, sets, smoke=smoke), batch * length * bytes_per_token


def _report(records: Records) -> str:
    limits = limits_of(records)
    decode = Table("batch x context", "KV", "by", "µs (min)", "GB/s", "% of copy")
    prefill = Table("tokens", "KV", "by", "ms (min)", "TFLOP/s", "% of bf16 peak")
    for r in records["attention"]:
        seconds, by = r["us"] * 1e-6, r["by"]
        if r["kind"] == "decode":
            share = percent(floor_s(limits, r["kv_bytes"]), seconds) if limits else NOTHING
            rate = f"{r['kv_bytes'] / seconds / 1e9:,.0f}"
            decode.add(
                f"{r['batch']} x {r['tokens']}", r["kv_dtype"], by, f"{r['us']:.1f} ({r['us_min']:.1f})", rate, share
            )
        else:
            share = percent(r["flops"] / limits.flops["bf16"], seconds) if limits else NOTHING
            rate = f"{r['flops'] / seconds / 1e12:.1f}"
            prefill.add(r["tokens"], r["kv_dtype"], by, f"{r['us'] / 1e3:.3f} ({r['us_min'] / 1e3:.3f})", rate, share)
    heads = (
        f"{HEADS} query heads over {KV_HEADS} key heads of {HEAD_DIM}, pages of {PAGE}; one layer, without its plan."
    )
    return "\n\n".join((heads, decode.markdown(), prefill.markdown()))


PART = Part(
    "attention",
    "decode against the copy's bandwidth, prefill against the peak of bf16",
    _cases,
    _run,
    _report,
    environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
)
