"""What the rules let pass, and why.

An entry that no longer matches anything makes the test fail, so that none outlives its reason.
"""

from __future__ import annotations

_START_UP = "start-up speed: this import loads jax, which `--help` and wrong flags must not wait for"

_EXTRA = "an extra that need not be installed: whoever asks for it without is told what to install"

# "file: function: imported name" -> reason
LOCAL_IMPORTS: dict[str, str] = {
    "serving/backend.py: create_engine: engine.Engine": _START_UP,
    "serving/backend.py: create_client: engine.async_engine.AsyncEngine": _START_UP,
    "serving/backend.py: create_client: engine.remote.client.RemoteEngine": _START_UP,
    "serving/backend.py: compile_bundle: engine.bundle.write.compile_bundle": _START_UP,
    "serving/backend.py: convert_model: engine.convert.convert_model": _START_UP,
    "serving/backend.py: evaluate_model: engine.evaluate.evaluate_model": _START_UP,
    "serving/backend.py: plan_model: engine.planning.plan.make_plan": _START_UP,
    "serving/backend.py: distill_draft: engine.distill.distill_draft": _START_UP,
    "serving/backend.py: quantize_model: engine.quantize.quantize": _START_UP,
    "serving/backend.py: replay_recording: engine.replay.player.replay": _START_UP,
    "serving/observability.py: _spans: serving.tracing.spans.RequestSpans": _EXTRA,
    "engine/startup.py: main: engine.engine.Engine": "what this import takes is what is measured",
    "engine/__init__.py: __getattr__: engine.engine.Engine": _START_UP,
    "engine/__init__.py: __getattr__: engine.async_engine.AsyncEngine": _START_UP,
}

# "file: library" -> reason why it is an extra and not a dependency
EXTRA_LIBRARIES: dict[str, str] = {
    "serving/tracing/spans.py: opentelemetry": "the extra `otel`: only who has a collector needs it",
}

# "file" -> reason why it is one thing and not two
LONG_FILES: dict[str, str] = {}
