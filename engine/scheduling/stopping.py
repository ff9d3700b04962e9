"""When a sequence ends by itself. Stop strings are the engine's: they need text."""

from __future__ import annotations

from engine.requests.sequence import FinishReason, Sequence


def find_stop(sequence: Sequence, max_len: int) -> tuple[FinishReason, int | None] | None:
    """Whether the last token read ends the sequence, and why: EOS, then stop token ids, then length (vLLM's
    `check_stop`).

    Args:
        sequence: with at least one output; the last one is judged.
        max_len: most tokens of a sequence, prompt included.

    Returns:
        Finish reason and stop reason (the stop token id; None for EOS and length), or None to go on.
    """
    request, outputs = sequence.request, sequence.output_token_ids
    params, num_outputs = request.params, len(outputs)
    if num_outputs >= params.min_tokens:
        if outputs[-1] in request.eos_token_ids:
            return FinishReason.STOP, None
        if params.stop_token_ids and outputs[-1] in params.stop_token_ids:
            return FinishReason.STOP, outputs[-1]
    if num_outputs >= request.max_tokens or request.num_prompt_tokens + num_outputs >= max_len:
        return FinishReason.LENGTH, None
    return None
