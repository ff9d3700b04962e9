"""What a decoder costs, from its shapes alone: bytes and operations. No jax here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from models.config import ModelConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelCosts:
    """What a decoder costs, from its shapes.

    Attributes:
        body_weights: elements of all matrices of the layers.
        head_weights: elements of the output head, V·E.
        kv_elements_per_token: keys and values of all layers, 2·K·D·L.
        attention_flops_per_pair: 4·H·D·L, for one query that sees one key.
        item_bytes: bytes per element.
        body_item_bytes, head_item_bytes: the same of weights that are stored otherwise; None = `item_bytes`.
    """

    body_weights: int
    head_weights: int
    kv_elements_per_token: int
    attention_flops_per_pair: int
    item_bytes: int
    body_item_bytes: float | None = None
    head_item_bytes: float | None = None

    @classmethod
    def of(cls, config: ModelConfig, dtype: str) -> ModelCosts:
        """The costs of a model in a dtype."""
        attention = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
        mlp = 3 * config.hidden_size * config.intermediate_size
        return cls(
            body_weights=config.num_layers * (attention + mlp),
            head_weights=config.vocab_size * config.hidden_size,
            kv_elements_per_token=2 * config.kv_size * config.num_layers,
            attention_flops_per_pair=4 * config.q_size * config.num_layers,
            item_bytes=ITEM_BYTES[dtype],
        )

    def decode_bytes(self, context: float) -> float:
        """Bytes that one token of one sequence must read, at a context of so many tokens."""
        body = self.body_weights * (self.body_item_bytes or self.item_bytes)
        head = self.head_weights * (self.head_item_bytes or self.item_bytes)
        return body + head + self.kv_elements_per_token * context * self.item_bytes

    def with_weights(self, body: float | None, head: float | None) -> ModelCosts:
        """The same with so many bytes per weight of the layers and of the head; None = as they are."""
        return replace(self, body_item_bytes=body or self.body_item_bytes, head_item_bytes=head or self.head_item_bytes)

    def sequence_flops(self, num_prompt: int, num_output: int) -> int:
        """Operations for one sequence: every token but the last passes the layers, only sampled ones need the head."""
        tokens = num_prompt + num_output - 1
        pairs = tokens * (tokens + 1) // 2
        head = 2 * self.head_weights * num_output
        return 2 * self.body_weights * tokens + head + self.attention_flops_per_pair * pairs
