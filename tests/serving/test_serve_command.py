"""`quire serve` as a process: what it prints, how it ends, and wrong flags in one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.cli import main
from serving.flags import add_server_flags, server_settings
from serving.http.settings import ServerSettings

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from serving.cli import main
from tests.serving.fakes import FakeEngine, Script

async def create(model, *, process, **settings):
    print(f"made {model} process={process} {sorted(settings)}", file=sys.stderr)
    return FakeEngine(Script(delay_s=0.05))

sys.exit(main(sys.argv[1:], client_factory=create))
"""


@contextlib.contextmanager
def quire(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `quire serve` of a scripted engine, and its URL."""
    command = [sys.executable, "-c", PROGRAM, "serve", "some/model", "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["url"]
    finally:
        process.kill()
        process.wait()


def ask(url: str, body: dict[str, Any]) -> str:
    """The text of a completion's answer."""
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        return response.read().decode()


def test_it_says_where_it_listens_and_ends_on_sigterm() -> None:
    with quire("--served-model-name", "a", "--served-model-name", "b", "--no-engine-process") as (process, url):
        assert json.loads(ask(url, {"prompt": "x", "max_tokens": 2}))["model"] == "a"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 0, said
    assert f"Serving a, b on {url}" in said and "made some/model process=False ['compile_in_background']" in said
    assert "POST   /v1/chat/completions" in said and "512 tokens of context" in said


@pytest.mark.parametrize(("number", "count"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_signals_while_a_stream_runs(number: signal.Signals, count: int) -> None:
    """One signal lets the stream end; a second one ends it at once, with a last event. Exit code 0 both times."""
    with quire("--shutdown-timeout", "20") as (process, url):
        texts: list[str] = []
        body = {"prompt": "x", "stream": True, "max_tokens": 40, "ignore_eos": True}
        reader = threading.Thread(target=lambda: texts.append(ask(url, body)))
        reader.start()
        time.sleep(0.5)
        begun = time.monotonic()
        for _ in range(count):
            process.send_signal(number)
            time.sleep(0.2)
        process.communicate(timeout=20)
        took = time.monotonic() - begun
        reader.join(20)
    assert process.returncode == 0
    assert texts[0].endswith("data: [DONE]\n\n")
    assert ('"finish_reason":"length"' if count == 1 else '"finish_reason":"abort"') in texts[0]
    assert (took > 0.8) == (count == 1)


def test_a_port_in_use_is_one_line() -> None:
    with quire() as (_, url):
        port = url.rsplit(":", 1)[1]
        command = [sys.executable, "-c", PROGRAM, "serve", "--port", port]
        other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert other.returncode == 2
    last = other.stderr.strip().splitlines()[-1]
    assert last.startswith(f"quire: error: cannot listen on 127.0.0.1 port {port}: the address is in use")
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--port", "99999"], "port"),
        (["--ssl-keyfile", "x"], "ssl_certfile"),
        (["--tool-call-parser", "nonsense"], "nonsense"),
        (["--reasoning-parser", "nonsense"], "nonsense"),
        (["--chat-template", "/does/not/exist"], "chat template"),
        (["m", "--model", "n"], "MODEL"),
        (["--max-model-len", "0"], "max_model_len"),
    ],
)
def test_wrong_flags_are_one_line_before_anything_is_loaded(
    flags: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def create(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing may be loaded")

    assert main(["serve", *flags], client_factory=create) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("quire: error: ") and "\n" not in said and word in said


def test_every_setting_has_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_server_flags(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    for field in dataclasses.fields(ServerSettings):
        assert "--" + field.name.replace("_", "-") in flags
    given = parser.parse_args(
        ["--api-key", "a", "--api-key", "b", "--no-access-log", "--request-timeout", "2.5", "--uds", "/x"]
    )
    assert server_settings(given) == {"api_key": ["a", "b"], "access_log": False, "request_timeout": 2.5, "uds": "/x"}


def test_the_flags_are_documented() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(ServerSettings):
        row = next(line for line in text.splitlines() if line.startswith(f"| `--{field.name.replace('_', '-')}` |"))
        assert field.metadata["help"].replace("|", "\\|") in row
