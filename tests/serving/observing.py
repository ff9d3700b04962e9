"""What the tests of observers share: an engine that only has a snapshot, and requests that were."""

from __future__ import annotations

from typing import Any

from engine.client import EngineInfo
from engine.errors import EngineDeadError
from engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from engine.sampling_params import RequestOutputKind, SamplingParams
from serving.http.observer import RequestEnd, RequestStart

INFO = EngineInfo(
    model="tiny",
    vocab_size=320,
    embedding_size=64,
    max_model_len=1000,
    max_num_seqs=4,
    max_logprobs=20,
    eos_token_ids=(2,),
    num_kv_blocks=255,
    block_size=16,
    priorities=False,
    default_sampling=SamplingParams(),
    description={"kv_cache_dtype": "bfloat16"},
)

# One entry for each of `engine.snapshot`, all different.
SNAPSHOT: dict[str, Any] = {
    "num_running": 3,
    "num_waiting": 2,
    "num_queued_reqs": 1,
    "num_in_flight": 1,
    "kv_cache_usage": 0.25,
    "num_free_blocks": 191,
    "num_preemptions": 7,
    "num_prefix_queried_tokens": 900,
    "num_prefix_hit_tokens": 300,
    "num_steps": 50,
    "num_tokens": 1100,
    "num_padded_tokens": 1300,
    "step_tokens": {1: 30, 8: 10, 100: 10},
    "num_requests": 12,
    "num_rejected": 4,
    "num_drafts": 6,
    "num_draft_tokens": 17,
    "num_accepted_tokens": 11,
    "accepted_at": [5, 4, 2],
    "prompt_tokens": 850,
    "cached_prompt_tokens": 280,
    "generation_tokens": 400,
    "finished": {"stop": 5, "length": 3, "abort": 1},
    "num_failed_steps": 6,
    "plan_s": 0.5,
    "dispatch_s": 1.5,
    "collect_s": 2.5,
    "commit_s": 3.5,
    "compiles_after_ready": 0,
}


class SnapshotClient:
    """The part of an `EngineClient` that metrics need. Attributes: dead: True = the engine has stopped."""

    def __init__(self, snapshot: dict[str, Any] | None = None) -> None:
        self.info = INFO
        self.dead = False
        self._snapshot = SNAPSHOT if snapshot is None else snapshot

    async def snapshot(self) -> dict[str, Any]:
        """The same each time."""
        if self.dead:
            raise EngineDeadError("it stopped")
        return self._snapshot


def start_of(name: str = "req-1", *, stream: bool = True, **fields: Any) -> RequestStart:
    """A request of 10 tokens that came at 100 s."""
    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    fields.setdefault("params", SamplingParams(max_tokens=16, output_kind=kind))
    return RequestStart(
        **{
            "request_id": name,
            "endpoint": "/v1/completions",
            "model": "tiny",
            "num_prompt_tokens": 10,
            "time": 100.0,
            **fields,
        }
    )


def end_of(name: str = "req-1", **fields: Any) -> RequestEnd:
    """Its end: queued for 0.5 s, first token after 0.7 s, eleven tokens until 1.7 s, ended after 1.8 s."""
    times = RequestMetrics(100.0, 100.0, 100.5, 100.7, 101.7, num_generation_tokens=11, num_preemptions=1)
    completion = CompletionOutput(0, "secret answer", (1, 2), finish_reason="stop")
    output = RequestOutput(
        name, "secret prompt", tuple(range(10)), [completion], True, num_cached_tokens=4, metrics=times
    )
    return RequestEnd(
        **{
            "request_id": name,
            "finish_reasons": ("stop",),
            "status": 200,
            "output": output,
            "num_output_tokens": 11,
            "first_token_s": 0.75,
            "e2e_s": 1.8,
            **fields,
        }
    )
