"""What the rules let pass, and why.

An entry that no longer matches anything makes the test fail, so that none outlives its reason.
"""

from __future__ import annotations

_START_UP = "start-up speed: this import loads jax, which `--help` and wrong flags must not wait for"

# "file: function: imported name" -> reason
LOCAL_IMPORTS: dict[str, str] = {
    "serving/backend.py: create_engine: engine.Engine": _START_UP,
    "serving/backend.py: create_client: engine.async_engine.AsyncEngine": _START_UP,
    "serving/backend.py: create_client: engine.remote.client.RemoteEngine": _START_UP,
    "serving/backend.py: convert_model: engine.convert.convert_model": _START_UP,
    "engine/__init__.py: __getattr__: engine.engine.Engine": _START_UP,
    "engine/__init__.py: __getattr__: engine.async_engine.AsyncEngine": _START_UP,
}

# "file" -> reason why it is one thing and not two
LONG_FILES: dict[str, str] = {}
