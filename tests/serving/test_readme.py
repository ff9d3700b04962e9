"""The README's examples of a server, run as they are written, but for the port."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.endpoints import ALL_ROUTES
from serving.observability import ObservabilityConfig, observe
from tests.serving.fakes import FakeEngine, Script
from tests.serving.threaded import Server

ROOT = Path(__file__).parents[2]
ANSWER = "Light is scattered."


def examples(language: str) -> list[str]:
    """The code of the section "Serve"."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Serve\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    live = Server(FakeEngine(Script(answer=ANSWER)), served_model_name=["demo"])
    yield live
    live.close()


def here(text: str, server: Server) -> str:
    """An example with the address of the test's server."""
    assert "http://127.0.0.1:8000" in text
    return text.replace("http://127.0.0.1:8000", server.url)


def test_curl(server: Server) -> None:
    command = next(text for text in examples("sh") if text.startswith("curl"))
    words = shlex.split(here(command, server).replace("\\\n", ""))
    answer = json.loads(subprocess.run([*words, "-sS"], check=True, capture_output=True, timeout=30).stdout)
    assert answer["choices"][0]["message"]["content"] == ANSWER


def test_the_openai_client(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = examples("python")
    exec(compile(here(code, server), "README.md", "exec"), {})
    assert capsys.readouterr().out == ANSWER


def test_the_routes_of_the_documentation_exist() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").partition("## Endpoints")[2].partition("\n## ")[0]
    told = set(re.findall(r"`(GET|POST|DELETE) ([^`]+)`", text))
    watching = observe(FakeEngine(), "demo", ObservabilityConfig(log_requests=False)).routes
    names = {"{id:.+}": "{id}", "{request_id}": "{id}"}
    served = {
        (route.method, re.sub(r"\{.*?\}", lambda match: names.get(match[0], match[0]), route.path))
        for route in (*ALL_ROUTES, *watching)
    }
    assert len(told) > 8
    assert told - {("GET", "/openapi.json")} <= served, "what is told is there"
    assert ("POST", "/v1/completions") in told and ("POST", "/v1/chat/completions") in told
