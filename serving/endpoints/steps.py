"""`GET /engine/steps`: what the engine does now and which steps it made lately. The chat page polls it.

Nothing is counted or kept for it: without a reader it costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from aiohttp import web

from engine.client import StepEvent
from serving.http.context import context_of
from serving.http.errors import ApiError
from serving.http.reply import reply
from serving.http.routes import Route
from serving.protocol.steps import EngineStep, EngineSteps

MOST_IN_FLIGHT = 4  # an older step without a duration failed: nobody waits for it


async def engine_steps(request: web.Request) -> web.Response:
    """`GET /engine/steps?since=N`: steps from number N on; without it all that the engine remembers.

    Raises:
        ApiError: `since` is not a whole number of 0 or more.
        EngineDeadError: the engine is not running.
    """
    context = context_of(request)
    client, info = context.client, context.client.info
    since = _since(request)
    snapshot = await client.snapshot()
    reset = since > snapshot["num_steps"]  # a new engine counts from 0 again
    if reset:
        since = 0
    steps = await client.recent_steps(since)
    queried = snapshot["num_prefix_queried_tokens"]
    return reply(
        EngineSteps(
            now=time.monotonic(),
            model=context.model_names[0],
            device=info.description.get("device"),
            dtype=info.description.get("dtype"),
            max_model_len=info.max_model_len,
            max_num_seqs=info.max_num_seqs,
            num_kv_blocks=info.num_kv_blocks,
            block_size=info.block_size,
            num_running=snapshot["num_running"],
            num_waiting=snapshot["num_waiting"],
            kv_cache_usage=snapshot["kv_cache_usage"],
            num_preemptions=snapshot["num_preemptions"],
            prefix_hit_rate=snapshot["num_prefix_hit_tokens"] / queried if queried else None,
            compiles_after_ready=snapshot["compiles_after_ready"],
            reset=reset,
            next_since=_next_since(steps, since),
            steps=[EngineStep(**asdict(step)) for step in steps],
        )
    )


def _since(request: web.Request) -> int:
    text = request.query.get("since", "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise ApiError(400, f"since must be the number of a step, 0 or more, got {text[:40]!r}.", "since")
    return int(text)


def _next_since(steps: Sequence[StepEvent], since: int) -> int:
    """The first step that may still change."""
    if not steps:
        return since
    running = (step.step_id for step in steps[-MOST_IN_FLIGHT:] if step.duration_s is None)
    return next(running, steps[-1].step_id + 1)


ROUTES = (Route("GET", "/engine/steps", engine_steps, "What the engine does now, step by step.", response=EngineSteps),)
