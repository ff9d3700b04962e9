"""Greedy decoding and teacher-forced log-probabilities, spelled out by hand so that nothing stops or warps them.

T is the number of tokens of prompt and continuation together, V the vocabulary size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Measured:
    """What one prompt gives: the golden values and how safely each greedy choice was made."""

    prompt: list[int]
    continuation: list[int]
    logprobs: np.ndarray  # float32 [T - 1]; entry i is log p(token[i + 1] | token[: i + 1])
    last_prompt_logits: np.ndarray  # float32 [V]; the logits that choose continuation[0]
    gaps: np.ndarray  # float32 [len(continuation)]; top-1 minus top-2 logit of each greedy step

    @property
    def min_gap(self) -> float:
        """The smallest top-1 to top-2 logit gap of the continuation."""
        return float(self.gaps.min())

    @property
    def min_gap_step(self) -> int:
        """The step of the smallest gap (0 chooses the first token of the continuation)."""
        return int(self.gaps.argmin())


@torch.inference_mode()
def forward(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] of the whole sequence, computed at once and without a cache."""
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]


def greedy_uncached(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy continuation that recomputes everything each step; end-of-sequence tokens do not stop it."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(forward(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@torch.inference_mode()
def greedy_cached(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy continuation over a KV cache, and the logits [num_tokens, V] that chose it."""
    cache = DynamicCache(config=model.config)
    pending, chosen, rows = list(prompt), [], []
    for _ in range(num_tokens):
        output = model(input_ids=torch.tensor([pending]), past_key_values=cache, use_cache=True)
        rows.append(output.logits[0, -1])
        chosen.append(int(rows[-1].argmax()))
        pending = chosen[-1:]
    return chosen, torch.stack(rows)


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int]) -> np.ndarray:
    """float32 [T - 1]: log p(token[i + 1] | token[: i + 1]) from float32 logits, the softmax itself in float64."""
    logprobs = torch.log_softmax(logits[:-1].double(), dim=-1)
    return logprobs.gather(1, torch.tensor(list(tokens[1:]))[:, None])[:, 0].float().numpy()


def measure(model: PreTrainedModel, prompt: Sequence[int], continuation: Sequence[int]) -> Measured:
    """Teacher-force prompt + continuation in one pass; refuse a continuation that this pass would not choose."""
    tokens = [*prompt, *continuation]
    logits = forward(model, tokens)
    steps = logits[len(prompt) - 1 : -1]
    if steps.argmax(dim=-1).tolist() != list(continuation):
        raise ValueError("the teacher-forced pass disagrees with the greedy continuation")
    top2 = steps.topk(2, dim=-1).values
    return Measured(
        prompt=list(prompt),
        continuation=list(continuation),
        logprobs=token_logprobs(logits, tokens),
        last_prompt_logits=logits[len(prompt) - 1].numpy().copy(),
        gaps=(top2[:, 0] - top2[:, 1]).numpy(),
    )


def cache_noise(model: PreTrainedModel, measured: Measured) -> float:
    """Largest logprob difference between one pass and token-by-token decoding: the noise of float32 summation order."""
    chosen, logits = greedy_cached(model, measured.prompt, len(measured.continuation))
    if chosen != measured.continuation:
        raise ValueError("decoding over a KV cache disagrees with the greedy continuation")
    return continuation_noise(measured, logits)


def continuation_noise(measured: Measured, logits: torch.Tensor) -> float:
    """Largest difference between the logprobs of `logits` [num_tokens, V] and the measured ones of the continuation."""
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(measured.continuation)[:, None])[:, 0].numpy()
    return float(np.abs(chosen - measured.logprobs[len(measured.prompt) - 1 :]).max())
