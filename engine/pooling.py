"""Requests that are only pooled: what they ask for, and the last step of their arithmetic, on the host.

A pooled request runs in the same loop as all others: its prompt is computed, in chunks if it is long, and its blocks
can be found in the prefix cache. It samples nothing; it ends when its prompt is computed. What it gets is a sum over
hidden states that the device forms step by step (`engine.runtime.pooling`). No jax here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from engine.errors import InvalidRequestError
from engine.sampling_params import RequestOutputKind, SamplingParams

Pooling = Literal["last", "mean"]
POOLINGS: tuple[str, ...] = get_args(Pooling)
SMALLEST_NORM = 1e-12  # a vector of zeros stays one


@dataclass(frozen=True)
class PoolingParams:
    """How hidden states become one vector.

    Attributes:
        pooling: "last" = that of the last token; "mean" = the mean over all tokens of the prompt.
        normalize: divide by the L2 norm.

    Raises:
        InvalidRequestError: of the wrong type, or a pooling that there is not.
    """

    pooling: Pooling = "last"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InvalidRequestError(f"pooling must be one of {', '.join(POOLINGS)}; got {self.pooling!r}.", "pooling")
        if not isinstance(self.normalize, bool):
            raise InvalidRequestError(f"normalize must be true or false, got {self.normalize!r}.", "normalize")

    @property
    def sampling(self) -> SamplingParams:
        """What the loop sees in the place of sampling parameters: one result, and nothing on the way.

        A token found in the prefix cache has no hidden state any more, so a mean computes every token; the last token
        is never read from the cache.
        """
        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            detokenize=False,
            skip_reading_prefix_cache=self.pooling == "mean",
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def finish_pooling(total: np.ndarray, num_tokens: int, params: PoolingParams) -> tuple[float, ...]:
    """The embedding of a request.

    Args:
        total: float32[E], sum of the hidden states that count.
        num_tokens: of the prompt.
    """
    vector = total / np.float32(num_tokens) if params.pooling == "mean" else total
    if params.normalize:
        norm = np.sqrt(np.square(vector, dtype=np.float64).sum())
        vector = vector / np.float32(max(norm, SMALLEST_NORM))
    return tuple(vector.astype(np.float32).tolist())
