"""Usage: tokens of a request, counted while outputs come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.outputs import RequestOutput


@dataclass
class UsageCounter:
    """Counts the outputs of one HTTP request.

    Attributes:
        prompts: number of the job → (tokens of its prompt, how many were in the prefix cache).
        completion_tokens: of all completions so far.
    """

    prompts: dict[int, tuple[int, int]] = field(default_factory=dict)
    completion_tokens: int = 0

    def count(self, number: int, output: RequestOutput) -> None:
        """Take the next output (a delta, or the final one) of job `number`."""
        self.prompts[number] = (len(output.prompt_token_ids), output.num_cached_tokens)
        for completion in output.outputs:
            self.completion_tokens += len(completion.token_ids)

    def usage(self) -> dict[str, Any]:
        """The `usage` object so far."""
        prompt_tokens = sum(total for total, _ in self.prompts.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self.prompts.values())},
        }


def usage_of(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """The `usage` object of final outputs."""
    counter = UsageCounter()
    for number, output in enumerate(outputs):
        counter.count(number, output)
    return counter.usage()
