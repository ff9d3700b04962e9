"""The least time that a step of a dense decoder can take on a GPU.

    t_decode = max(weight bytes / BW, 2·weights·B / F) + max(KV bytes of all contexts / BW, 4·contexts·H·D·L / F16)

BW is what copying reaches (bytes read plus bytes written per second), F the rate of large matrix products in the dtype
of the weights' products, F16 the rate of bfloat16, in which attention computes whatever its cache holds. Embedding
look-ups, norms, activations and sampling are left out: under 1 %, but for small models at large batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.costs import ModelCosts

# Bytes of a weight. int4: groups of 128 with one 16-bit scale each.
WEIGHT_BYTES: Mapping[str, float] = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2 / 128}
KV_BYTES: Mapping[str, int] = {"bf16": 2, "fp8": 1, "int8": 1}
# dtype of a weight -> dtype in which its products run.
COMPUTE: Mapping[str, str] = {"bf16": "bf16", "fp8": "fp8", "int8": "int8", "int4": "bf16"}


@dataclass(frozen=True)
class Limits:
    """What a device reaches at best.

    Attributes:
        bandwidth: bytes per second of a copy, read and write counted.
        flops: dtype ("bf16", "fp8", "int8") -> operations per second of large products.
    """

    bandwidth: float
    flops: Mapping[str, float]


@dataclass(frozen=True)
class Precision:
    """What weights, cache and output head are stored in."""

    weights: str = "bf16"
    kv: str = "bf16"
    head: str = "bf16"


def floor_s(limits: Limits, num_bytes: float, flops: float = 0.0, compute: str = "bf16") -> float:
    """Least seconds for so many bytes and operations, if the two overlap perfectly."""
    return max(num_bytes / limits.bandwidth, flops / limits.flops[compute])


def decode_s(costs: ModelCosts, limits: Limits, batch: int, context: int, precision: Precision) -> float:
    """Least seconds of one decode step of `batch` sequences that each see `context` tokens and their own."""
    weight_bytes = (
        costs.body_weights * WEIGHT_BYTES[precision.weights] + costs.head_weights * WEIGHT_BYTES[precision.head]
    )
    products = _products_s(costs, limits, precision, body_rows=batch, head_rows=batch)
    kv_bytes = batch * (context + 1) * costs.kv_elements_per_token * KV_BYTES[precision.kv]
    pairs = batch * context
    return max(weight_bytes / limits.bandwidth, products) + floor_s(
        limits, kv_bytes, pairs * costs.attention_flops_per_pair
    )


def prefill_s(costs: ModelCosts, limits: Limits, tokens: int, precision: Precision) -> float:
    """Least seconds until the logits after a prompt of so many tokens, which attend to each other causally."""
    body = floor_s(
        limits,
        costs.body_weights * WEIGHT_BYTES[precision.weights],
        2 * costs.body_weights * tokens,
        COMPUTE[precision.weights],
    )
    pairs = tokens * (tokens + 1) / 2
    attention = pairs * costs.attention_flops_per_pair / limits.flops["bf16"]
    head_bytes = costs.head_weights * WEIGHT_BYTES[precision.head]
    return body + attention + floor_s(limits, head_bytes, 2 * costs.head_weights, COMPUTE[precision.head])


def _products_s(costs: ModelCosts, limits: Limits, precision: Precision, *, body_rows: int, head_rows: int) -> float:
    body = 2 * costs.body_weights * body_rows / limits.flops[COMPUTE[precision.weights]]
    return body + 2 * costs.head_weights * head_rows / limits.flops[COMPUTE[precision.head]]
