"""Sampling on the device, with all of `SamplingParams`, any mix of them in one batch.

The problem: each request brings its own temperature, filters, penalties, bans, seed; a step is one executable of fixed
shapes, the host reads its tokens one step late, and a request's tokens must not depend on who shares its batch.

The idea: parameters travel as one int32 block of the step (`inputs`); what must be remembered (token counts, biases,
bad words) lives in rows on the device and is updated by the step itself (`state`); random numbers are functions of
(seed, position, token id) (`noise`); min_p, top_k and top_p are thresholds found without a sort (`filters`). Three
static variants keep a greedy batch from paying for more than an argmax.

    Request ─ pack_params ─▶ int32[W] ─ pack_step ─▶ int32[S, W] ─ unpack ─▶ SamplingInputs ┐
       └───── reset_row ───▶ SamplerState (donated) ────────────────────────────────────────┼─▶ sample ─▶ SampledTokens,
                                                                             logits [S, V] ─┘            SamplerState

It does not know of schedules, stop strings, grammars (mask the logits before) or text.
"""

from engine.runtime.sampling.inputs import (
    WIDTH,
    Column,
    Flag,
    SamplerVariant,
    SamplingInputs,
    choose_variant,
    needs_state,
    pack_params,
    pack_step,
    padding_params,
    split_drafts,
    stop_ids_of,
    unpack,
    with_drafts,
)
from engine.runtime.sampling.logprobs import NUM_TOP, LogprobArrays, full_logprobs, prompt_logprobs, token_logprobs
from engine.runtime.sampling.sampler import SampledTokens, sample
from engine.runtime.sampling.state import SamplerState, make_state, reset_row, state_size_bytes, warm_up_rows
from engine.runtime.sampling.verify import verify

__all__ = [
    "NUM_TOP",
    "WIDTH",
    "Column",
    "Flag",
    "LogprobArrays",
    "SampledTokens",
    "SamplerState",
    "SamplerVariant",
    "SamplingInputs",
    "choose_variant",
    "full_logprobs",
    "make_state",
    "needs_state",
    "pack_params",
    "pack_step",
    "padding_params",
    "prompt_logprobs",
    "reset_row",
    "sample",
    "state_size_bytes",
    "split_drafts",
    "stop_ids_of",
    "token_logprobs",
    "unpack",
    "verify",
    "warm_up_rows",
    "with_drafts",
]
