"""`quire generate` with a fake engine: what is printed where, and what reaches the engine."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from engine.sampling_params import RequestOutputKind, SamplingParams
from serving.cli import main
from tests.cli.fake_engine import TPOT_S, TTFT_S, FakeEngine, FakeFactory

Capture = pytest.CaptureFixture[str]


def generate(*args: str, factory: FakeFactory | None = None) -> tuple[int, FakeFactory]:
    factory = factory or FakeFactory()
    return main(["generate", *args], engine_factory=factory), factory


def test_one_prompt_streams_and_reports_its_speed(capsys: Capture) -> None:
    code, factory = generate("--max-tokens", "3", "Once upon")
    out = capsys.readouterr().out
    assert code == 0
    assert out.startswith("Once uponw0 w1 w2 \n")
    assert "3 tokens (length) · TTFT 250 ms · 2.0 tokens/s" in out
    assert "implementation: xla (cpu, float32)" in out
    [(prompts, params)] = factory.made.calls
    assert prompts == ["Once upon"]
    assert params[0].output_kind is RequestOutputKind.DELTA
    assert factory.made.streams_closed == 1


def test_json_is_one_object_per_line_and_nothing_else_on_stdout(capsys: Capture) -> None:
    code, factory = generate("--json", "--max-tokens", "3", "a", "bcd")
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and len(lines) == 2
    first, second = (json.loads(line) for line in lines)
    assert first == {
        "prompt": "a",
        "text": "w0 w1 w2 ",
        "token_ids": [0, 1, 2],
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_tokens": 1,
        "completion_tokens": 3,
        "cached_tokens": 0,
        "ttft_s": TTFT_S,
        "tokens_per_s": 1 / TPOT_S,
    }
    assert second["prompt_tokens"] == 3
    assert len(factory.made.calls) == 1, "several prompts are one batch"


def test_json_with_one_token_has_no_rate(capsys: Capture) -> None:
    generate("--json", "--max-tokens", "1", "a")
    assert json.loads(capsys.readouterr().out)["tokens_per_s"] is None


def test_json_with_logprobs_and_several_completions(capsys: Capture) -> None:
    generate("--json", "--max-tokens", "2", "--n", "3", "--logprobs", "1", "--prompt-logprobs", "1", "ab")
    value = json.loads(capsys.readouterr().out)
    assert [completion["index"] for completion in value["completions"]] == [0, 1, 2]
    assert value["completion_tokens"] == 6
    assert value["logprobs"][1] == {"1": {"logprob": -0.5, "rank": 1, "decoded_token": "w1"}}
    assert value["prompt_logprobs"] == [None, {}]


def test_several_prompts_are_printed_in_order(capsys: Capture) -> None:
    code, _ = generate("--max-tokens", "1", "first", "second")
    out = capsys.readouterr().out
    assert code == 0
    assert out.index("firstw0") < out.index("secondw0")


def test_several_completions_are_all_printed(capsys: Capture) -> None:
    generate("--n", "2", "--max-tokens", "2", "hello")
    out = capsys.readouterr().out
    assert out.count("hellow0 w1") == 2
    assert "4 tokens (length, length)" in out


def test_chat_wraps_each_prompt_as_a_user_message(capsys: Capture) -> None:
    _, factory = generate("--chat", "--max-tokens", "1", "How?", "Why so?")
    assert factory.made.conversations == [
        [{"role": "user", "content": "How?"}],
        [{"role": "user", "content": "Why so?"}],
    ]
    assert factory.made.calls[0][0] == [[4], [7]]
    assert "> How?\n" in capsys.readouterr().out


def test_settings_reach_the_engine_and_only_those_given(capsys: Capture) -> None:
    _, factory = generate("--model", "m", "--block-size", "32", "--no-enable-prefix-caching", "--seed", "5", "x")
    assert factory.made.model == "m"
    given = {"block_size": 32, "enable_prefix_caching": False, "seed": 5}
    assert factory.made.settings == {**given, "compile_in_background": True}


def test_flags_change_what_the_model_recommends() -> None:
    class Recommending(FakeFactory):
        def __call__(self, model: str, **settings: object) -> FakeEngine:
            engine = super().__call__(model, **settings)
            engine.default_sampling = SamplingParams(temperature=0.3, top_k=7)
            return engine

    _, factory = generate("--json", "--top-k", "4", "a", factory=Recommending())
    [(_, [params])] = factory.made.calls
    assert (params.temperature, params.top_k) == (0.3, 4)


def test_sampling_flags_reach_the_request(capsys: Capture) -> None:
    flags = ["--temperature", "0.5", "--stop", "A", "--stop", "B", "--stop-token-ids", "1,2", "--request-seed", "7"]
    _, factory = generate(*flags, "--logit-bias", '{"17": -100}', "--max-tokens", "none", "--ignore-eos", "x")
    params = factory.made.calls[0][1][0]
    assert (params.temperature, params.stop, params.stop_token_ids) == (0.5, ("A", "B"), (1, 2))
    assert (params.seed, params.logit_bias, params.max_tokens, params.ignore_eos) == (7, {17: -100.0}, None, True)


def test_prompts_from_stdin_and_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin\n"))
    _, factory = generate("--lines", "-f", str(path), "given", "-")
    assert factory.made.calls[0][0] == ["given", "from stdin", "one", "two"]

    _, factory = generate("-f", str(path))
    assert factory.made.calls[0][0] == ["one\n\ntwo\n"], "without --lines a file is one prompt"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "there is no prompt"),
        (["-f", "no/such/file"], "cannot read prompts from no/such/file"),
        (["--logprobs", "1", "x"], "--logprobs needs --json"),
        (["--prompt-logprobs", "1", "x"], "--prompt-logprobs needs --json"),
        (["--no-detokenize", "x"], "--no-detokenize needs --json"),
        (["--temperature", "9", "x"], "temperature must be in [0, 2], got 9.0."),
        (["--block-size", "9", "x"], "block_size must be 8, 16, 32, 64 or 128; got 9."),
        (["x" * 64], "maximum context length is 64 tokens"),
    ],
)
def test_a_users_fault_is_one_line_and_exit_code_2(args: list[str], message: str, capsys: Capture) -> None:
    code, _ = generate(*args)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("quire: error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_wrong_flags_are_found_before_the_engine_is_loaded(capsys: Capture) -> None:
    for args in (["--temperature", "9", "x"], ["--block-size", "9", "x"], [], ["--logprobs", "1", "x"]):
        _, factory = generate(*args)
        assert factory.engine is None


def test_a_request_that_fails_is_reported_and_exits_with_1(capsys: Capture) -> None:
    code, _ = generate("--json", "x", factory=FakeFactory(fail_with="the step\nfailed"))
    captured = capsys.readouterr()
    assert code == 1
    assert json.loads(captured.out)["error"] == "the step\nfailed"
    assert captured.err == "quire: error: the step failed\n"

    code, _ = generate("x", factory=FakeFactory(fail_with="the step failed"))
    assert code == 1 and "the step failed" in capsys.readouterr().err
