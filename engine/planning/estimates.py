"""Estimates from shapes: the work space of a step, and the least time that one can take. No jax here.

Letters: T tokens, S rows of logits, E model dim, H·D query width, K·D key width, F ffn, V vocab, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.planning.devices import PlanDevice
from engine.planning.report import DecodeFloor, PrefillFloor
from engine.runtime.buckets import Bucket
from models.config import ModelConfig
from models.parameters import parameter_shapes

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}

# Temporaries of three models' steps of 2048 tokens, compiled for an H200 (docs/measurements/h200-aot.md), are estimated
# at 0.7 to 1.1 times what XLA says. On a CPU, where XLA's attention gathers pages, the estimate can be several times
# too low: 3.0 MiB for 8.4 in one step of the demo model. There the largest step is compiled instead.


def work_space(config: ModelConfig, dtype: str, bucket: Bucket) -> int:
    """Bytes of a step's temporaries and outputs.

    outputs      hidden [T, E], logits float32 [S, V]
    temporaries  gate, up and their product [T, 3F], or q, k, v and attention's output; the residual stream and what
                 a norm makes of it in float32 [T, 2E]; float32 logits once more
    """
    item, tokens = ITEM_BYTES[dtype], bucket.num_tokens
    logits = bucket.num_logit_rows * config.vocab_size * 4
    layer = max(3 * config.intermediate_size, 2 * config.q_size + 2 * config.kv_size) * item
    return 2 * logits + tokens * (config.hidden_size * item + layer + 2 * config.hidden_size * 4)


@dataclass(frozen=True)
class StepCosts:
    """What a step reads and computes.

    Attributes:
        weight_bytes: that every step reads: all parameters but an embedding table of which only rows are looked up.
        product_elements: weights that every token is multiplied with, the head's not included.
        head_elements: V·E, for rows that sample.
        kv_bytes_per_token: keys and values of one token, all layers.
        attention_flops: of one query that sees one key, all layers: 4·H·D·L.
        compute: dtype of the products with the layers' weights.
        dtype: of the head's products and of attention.
    """

    weight_bytes: int
    product_elements: int
    head_elements: int
    kv_bytes_per_token: int
    attention_flops: int
    compute: str
    dtype: str

    @classmethod
    def of(
        cls, config: ModelConfig, sizes: dict[str, int], dtype: str, compute: str, kv_bytes_per_token: int
    ) -> StepCosts:
        """Of a model whose parameters take so many bytes."""
        shapes = parameter_shapes(config)
        matrices = sum(a * b for name, (a, b) in _matrices(shapes).items() if name.startswith("layers."))
        skipped = 0 if config.tie_word_embeddings else sizes["embed.weight"]
        return cls(
            weight_bytes=sum(sizes.values()) - skipped,
            product_elements=matrices,
            head_elements=config.vocab_size * config.hidden_size,
            kv_bytes_per_token=kv_bytes_per_token,
            attention_flops=4 * config.q_size * config.num_layers,
            compute=compute,
            dtype=dtype,
        )


def _matrices(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    return {name: (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2}


def decode_floor(costs: StepCosts, device: PlanDevice, num_seqs: int, context: int, fits: bool) -> DecodeFloor | None:
    """max(weight bytes / BW, products / F) + max(KV bytes / BW, attention / F), as if each pair overlapped perfectly;
    None if the device's bandwidth or rate is not known.
    """
    plain, rate = device.rate(costs.dtype), device.rate(costs.compute) or device.rate(costs.dtype)
    if device.bytes_per_s is None or plain is None or rate is None:
        return None
    products = 2 * num_seqs * (costs.product_elements / rate + costs.head_elements / plain)
    parts = {
        "weights": costs.weight_bytes / device.bytes_per_s,
        "products": products,
        "cache": num_seqs * (context + 1) * costs.kv_bytes_per_token / device.bytes_per_s,
        "attention": num_seqs * context * costs.attention_flops / plain,
    }
    seconds = max(parts["weights"], parts["products"]) + max(parts["cache"], parts["attention"])
    return DecodeFloor(num_seqs, context, seconds, max(parts, key=lambda name: parts[name]), fits)


def prefill_floor(costs: StepCosts, device: PlanDevice, num_tokens: int) -> PrefillFloor | None:
    """max(weight bytes / BW, products / F) + causal attention / F; None as for `decode_floor`."""
    plain, rate = device.rate(costs.dtype), device.rate(costs.compute) or device.rate(costs.dtype)
    if device.bytes_per_s is None or plain is None or rate is None:
        return None
    products = 2 * num_tokens * costs.product_elements / rate + 2 * costs.head_elements / plain
    attention = num_tokens * (num_tokens + 1) / 2 * costs.attention_flops / plain
    return PrefillFloor(num_tokens, max(costs.weight_bytes / device.bytes_per_s, products) + attention)
