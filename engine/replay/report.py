"""What a replay found. No jax here: the command line shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """The first thing that did not come out as it was recorded.

    Attributes:
        step: id of the step.
        what: "tokens", "logprobs", "prompt_logprobs", "full_logprobs" or "pooled"; or the stage at which a step failed
            once and not twice: "forward", "sample", "collect".
        where: request and position, of tokens.
        found, recorded: what came out now, and then.
    """

    step: int
    what: str
    where: str
    found: str
    recorded: str


@dataclass(frozen=True)
class ReplayReport:
    """A replay.

    Attributes:
        path: of the recording.
        recorded_on, device: "platform:kind" of then and now.
        num_steps, num_tokens: that were compared.
        seconds: of the replay, without building the engine.
        difference: the first; None if all came out the same, bit for bit.
    """

    path: str
    recorded_on: str
    device: str
    num_steps: int
    num_tokens: int
    seconds: float
    difference: Difference | None
