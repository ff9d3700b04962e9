"""`quire chat` with a fake engine and lines from stdin."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Generator

import pytest

from engine.outputs import RequestOutput
from engine.sampling_params import RequestOutputKind, SamplingParams
from serving.cli import main
from tests.cli.fake_engine import FakeEngine, FakeFactory


def chat(monkeypatch: pytest.MonkeyPatch, lines: list[str], *args: str) -> tuple[int, FakeEngine]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    factory = FakeFactory()
    code = main(["chat", *args], engine_factory=factory)
    return code, factory.made


def roles(conversation: list[dict[str, str]]) -> list[str]:
    return [message["role"] for message in conversation]


def test_the_history_grows_and_answers_stream(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, engine = chat(monkeypatch, ["Hi", "", "And?"], "--max-tokens", "2", "--system", "Be brief.")
    captured = capsys.readouterr()
    assert code == 0
    assert captured.out == "w0 w1 \nw0 w1 \n", "only answers are on stdout"
    assert "[2 tokens · TTFT 250 ms · 2.0 tokens/s]" in captured.err
    assert roles(engine.conversations[1]) == ["system", "user", "assistant", "user"]
    assert engine.conversations[1][2]["content"] == "w0 w1 "
    assert engine.streams_closed == 2
    assert engine.calls[0][1][0].output_kind is RequestOutputKind.DELTA


def test_an_answer_may_fill_the_context_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = chat(monkeypatch, ["Hi"])
    assert engine.calls[0][1][0].max_tokens is None


def test_reset_exit_and_unknown_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["Hi", "/reset", "Again", "/what", "/exit", "never"]
    code, engine = chat(monkeypatch, lines, "--max-tokens", "1", "--system", "S")
    assert code == 0
    assert [roles(conversation) for conversation in engine.conversations] == [["system", "user"]] * 2
    assert "There is no command /what" in capsys.readouterr().err


def test_a_message_that_the_engine_refuses_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse_long(self: FakeEngine, messages: list[dict[str, str]]) -> list[int]:
        self.conversations.append(list(messages))
        return [0] * sum(len(message["content"]) for message in messages)

    monkeypatch.setattr(FakeEngine, "apply_chat_template", refuse_long)
    code, engine = chat(monkeypatch, ["x" * 64, "short"], "--max-tokens", "1")
    assert code == 0
    assert "maximum context length is 64 tokens" in capsys.readouterr().err
    assert roles(engine.conversations[1]) == ["user"]


def test_an_interrupt_stops_the_answer_but_not_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = FakeEngine.stream

    def interrupted(self: FakeEngine, prompt: str | list[int], params: SamplingParams) -> Generator[RequestOutput]:
        for i, output in enumerate(original(self, prompt, params)):
            if i == 1 and len(self.calls) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield output

    monkeypatch.setattr(FakeEngine, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    code, engine = chat(monkeypatch, ["Hi", "More"], "--max-tokens", "5")
    captured = capsys.readouterr()
    assert code == 0
    assert captured.out.splitlines()[0] == "w0 w1 "
    assert "[2 tokens, stopped" in captured.err
    assert engine.conversations[1][1]["content"] == "w0 w1 ", "what was said before the interrupt stays said"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_request_that_fails_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nMore\n"))
    factory = FakeFactory(fail_with="the step failed")
    assert main(["chat", "--max-tokens", "2"], engine_factory=factory) == 0
    assert capsys.readouterr().err.count("quire: error: the step failed") == 2
    assert [roles(conversation) for conversation in factory.made.conversations] == [["user"], ["user"]]


def test_a_wrong_parameter_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    factory = FakeFactory()
    assert main(["chat", "--max-tokens", "0"], engine_factory=factory) == 2
    assert factory.engine is None
    assert "max_tokens must be at least 1" in capsys.readouterr().err
