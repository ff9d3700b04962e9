"""The signature of paged attention, and its dispatch.

    plan = plan_attention(batch, num_tokens, problem)          # once per step
    out  = paged_attention(q, pages, plan, problem, window=…)  # once per layer

`plan` holds what depends on lengths and block tables but not on the layer (work lists, sort orders): attention runs L
times per step, its plan once.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.kv_layout import Pages
from pallas_kernels.op import Implementation, Op, mosaic_gpu
from pallas_kernels.paged_attention import native_cpu, pallas_mosaic_gpu, reference, xla
from pallas_kernels.paged_attention.gpu_cases import gpu_cases
from pallas_kernels.paged_attention.problem import AttentionProblem
from pallas_kernels.ragged import RaggedBatch


def _everything(problem: AttentionProblem) -> str | None:
    if problem.num_heads % problem.num_kv_heads:
        return f"{problem.num_heads} query heads are not a multiple of {problem.num_kv_heads} kv heads"
    return None


OP = Op(
    name="paged_attention",
    implementations=(
        *mosaic_gpu(pallas_mosaic_gpu.make, pallas_mosaic_gpu.supports),
        Implementation(
            "native_cpu",
            {"plan": native_cpu.plan, "run": native_cpu.run},
            native_cpu.supports,
            native_cpu.device_reason,
            native_cpu.yields,
        ),
        Implementation("xla", {"plan": xla.plan, "run": xla.run}, _everything),
        Implementation("reference", {"plan": reference.plan, "run": reference.run}, _everything),
    ),
    automatic=("mosaic_gpu", "native_cpu", "xla"),
    gpu_cases=gpu_cases,
)


def plan_attention(batch: RaggedBatch, num_tokens: int, problem: AttentionProblem) -> Any:
    """What all layers of a step share.

    Args:
        batch: the ragged batch, S sequences.
        num_tokens: T, static.

    Returns:
        A pytree for `paged_attention`; its content is the implementation's own business.
    """
    return OP.choose(problem.implementation, problem).functions["plan"](batch, num_tokens, problem)


def paged_attention(
    q: jax.Array,
    pages: Pages,
    plan: Any,
    problem: AttentionProblem,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of every token row over its own sequence's pages.

    A query at position p of its sequence sees keys of positions `(p - window, p]`. The keys and values of this step's
    tokens must be in the pages already. Softmax runs in float32, in chunks of fixed size and fixed order, so a row's
    result does not depend on its batch mates (Dao et al. 2022, arXiv 2205.14135; online softmax: Milakov and
    Gimelshein 2018, arXiv 1805.02867).

    Args:
        q: [T, H, D].
        pages: [N, 2, K, P, D], with scales if quantized, see `kv_layout`.
        plan: from `plan_attention` of the same batch and problem.
        scale: multiplies the scores before the softmax.
        window: sliding window in tokens; None = all.
        soft_cap: scores become `cap * tanh(score / cap)`.
        sinks: [H], one more score per head that takes part in the softmax and has no value (attention sinks as in
            gpt-oss).

    Returns:
        [T, H, D] in q's dtype; padding rows are 0.
    """
    run = OP.choose(problem.implementation, problem).functions["run"]
    return run(q, pages, plan, problem, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks)
