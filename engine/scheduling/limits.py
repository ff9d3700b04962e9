"""`SchedulerLimits`: the numbers that a scheduler obeys, resolved from the configuration by its caller."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError
from engine.scheduling.policy import ORDER_KEYS


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """What one step may hold and who goes first; the caller has resolved what depends on platform and model.

    Attributes:
        max_num_seqs: rows of the device state, so the most sequences that run at a time.
        max_num_batched_tokens: most tokens computed in one step.
        max_model_len: most tokens of a sequence, prompt and outputs together.
        block_size: tokens per KV block.
        long_prefill_token_threshold: most tokens of one sequence per step; 0 = no limit but the budget.
        enable_chunked_prefill: False = a prompt is computed in one step or waits.
        enable_prefix_caching: False = only the sequences of one request share blocks.
        policy: "fcfs", or "priority" (lower `Request.priority` first).
        max_num_queued_reqs: most requests of which no sequence was admitted yet; None = no limit.
        max_num_queued_tokens: most prompt tokens of those requests together; None = no limit.

    Raises:
        ConfigError: a value is out of range, or contradicts another.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    policy: str = "fcfs"
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_num_seqs", self.max_num_seqs), ("block_size", self.block_size)):
            _check(value >= 1, f"{name} must be at least 1, got {value}.")
        for name, limit in (
            ("max_num_queued_reqs", self.max_num_queued_reqs),
            ("max_num_queued_tokens", self.max_num_queued_tokens),
        ):
            _check(limit is None or limit >= 1, f"{name} must be at least 1, got {limit}.")
        _check(self.max_model_len >= 2, f"max_model_len must be at least 2, got {self.max_model_len}.")
        # Otherwise the last of the running sequences would starve: each of them needs a token per step.
        budget, num_seqs = self.max_num_batched_tokens, self.max_num_seqs
        _check(budget >= num_seqs, f"max_num_batched_tokens must be at least max_num_seqs={num_seqs}, got {budget}.")
        threshold = self.long_prefill_token_threshold
        _check(threshold >= 0, f"long_prefill_token_threshold must be 0 or more, got {threshold}.")
        _check(
            threshold == 0 or self.enable_chunked_prefill,
            f"long_prefill_token_threshold={threshold} splits prompts, which enable_chunked_prefill=False forbids.",
        )
        known = ", ".join(ORDER_KEYS)
        _check(self.policy in ORDER_KEYS, f"scheduling_policy must be one of {known}; got {self.policy!r}.")

    @property
    def max_tokens_per_seq(self) -> int:
        """Most tokens that one sequence may compute in one step."""
        return self.long_prefill_token_threshold or self.max_num_batched_tokens
