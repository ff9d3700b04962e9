"""`quire bench serve` against a server whose times are known, and against servers that fail in each way."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from serving.bench.serve_client import StreamFault, StreamReader
from serving.cli import main
from tests.serving.scripted_server import Script, served

Capture = pytest.CaptureFixture[str]
SMALL = ["--input-len", "5", "--output-len", "6", "--num-prompts", "4"]


def bench(script: Script, tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "out.json"
    with served(script.app()) as url:
        code = main(["bench", "serve", "--base-url", url, *SMALL, "--json", str(out), *flags])
    return code, json.loads(out.read_text()) if out.exists() else {}


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_latencies_of_known_times(endpoint: str, tmp_path: Path, capsys: Capture) -> None:
    script = Script(delays_s=(0.2, 0.05))
    flags = ["--endpoint", endpoint, "--goodput", "ttft:1000", "tpot:1000", "--metric-percentiles", "50,90"]
    code, result = bench(script, tmp_path, *flags)
    assert code == 0 and result["completed"] == 4 and result["failed"] == 0
    assert result["total_output_tokens"] == 24 and result["total_input_tokens"] == 28, "as the server counts"
    # A busy machine can only be late, never early. The role that opens a chat is not its first token.
    for latency, least in {"ttft": 200, "tpot": 50, "itl": 50, "e2el": 450}.items():
        assert least - 10 <= result[f"median_{latency}_ms"] < least + 300, latency
    assert result["p90_ttft_ms"] >= result["p50_ttft_ms"] == result["median_ttft_ms"]
    assert result["duration"] >= 0.45 and result["request_goodput"] == result["request_throughput"] > 0
    assert result["max_concurrent_requests"] == 4 and all(len(gaps) == 5 for gaps in result["itls"])
    assert result["model"] == "scripted" and result["machine"]["cpu_count"] >= 1
    body = script.seen[-1]
    assert body["ignore_eos"] and body["stream"] and body["stream_options"] == {"include_usage": True}
    text = capsys.readouterr().out
    assert "output tokens/s" in text and "TTFT" in text and "scripted" in text


def test_merged_tokens_are_counted_by_usage(tmp_path: Path) -> None:
    _, result = bench(Script(delays_s=(0.01,), tokens_per_chunk=3), tmp_path)
    assert result["total_output_tokens"] == 24 and all(len(gaps) == 1 for gaps in result["itls"])


def test_ids_are_sent_as_ids(tmp_path: Path) -> None:
    script = Script()
    bench(script, tmp_path, "--vocab-size", "300", "--first-id", "200", "--num-warmups", "2")
    assert len(script.seen) == 6
    assert all(len(b["prompt"]) == 5 and all(200 <= token < 300 for token in b["prompt"]) for b in script.seen)
    assert len({str(body["prompt"]) for body in script.seen}) == 6, "warm-ups warm no prefix cache"


def test_the_rate_and_the_limit_of_concurrency_are_kept(tmp_path: Path) -> None:
    script = Script(delays_s=(0.02,))
    _, result = bench(script, tmp_path, "--request-rate", "20", "--burstiness", "inf", "--num-prompts", "8")
    gaps = [b - a for a, b in zip(result["start_times"], result["start_times"][1:], strict=False)]
    assert result["start_times"][0] >= 0.05 and sum(gaps) == pytest.approx(7 / 20, abs=0.15)
    script = Script(delays_s=(0.02,))
    _, result = bench(script, tmp_path, "--max-concurrency", "2", "--num-prompts", "8")
    assert script.most_running == 2 and result["max_concurrent_requests"] == 2


FAULTS = {
    "cut": "",
    "no-done": "the stream was cut after 6 chunks: it has no [DONE]",
    "error": "the engine died",
    "no-usage": "the last chunk has no usage: the server must support stream_options.include_usage",
    "short": "ended after 5 tokens instead of 6",
    "junk": "not an answer: <html>",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failures_are_counted_and_said(fault: str, tmp_path: Path, capsys: Capture) -> None:
    script = Script(fault=fault, fail_every=2)
    code, result = bench(script, tmp_path, "--num-warmups", "1")
    assert code == 0 and (result["completed"], result["failed"]) == (2, 2)
    (message,) = result["errors"]
    assert FAULTS[fault] in message and result["total_output_tokens"] == 12
    assert f"2 requests failed: {message}" in capsys.readouterr().err


def test_a_status_is_a_failure_with_its_message(tmp_path: Path) -> None:
    _, result = bench(Script(fail_with=503, fail_every=2), tmp_path)
    assert result["errors"] == {"HTTP 503: scripted failure": 2}


def test_all_failed_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    code, result = bench(Script(fail_with=500), tmp_path, "--num-warmups", "0")
    assert code == 1 and result["failed"] == 4 and "all 4 requests failed" in capsys.readouterr().err


def test_a_slow_server_times_out(tmp_path: Path) -> None:
    flags = ["--request-timeout", "0.2", "--num-warmups", "0"]
    code, result = bench(Script(delays_s=(0.0, 5.0)), tmp_path, *flags)
    assert code == 1 and result["errors"] == {"not answered within 0.2 s": 4}


def test_a_server_that_refuses_or_is_away_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    assert bench(Script(key="secret"), tmp_path)[0] == 2
    assert "answers HTTP 401: wrong API key" in capsys.readouterr().err
    assert bench(Script(fail_with=400), tmp_path)[0] == 2
    assert "failed: HTTP 400: scripted failure" in capsys.readouterr().err
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert "cannot reach http://127.0.0.1:9/v1/models" in error and error.count("\n") == 1


def test_the_key_is_sent_and_not_written(tmp_path: Path) -> None:
    code, result = bench(Script(key="secret"), tmp_path, "--api-key", "secret")
    assert code == 0 and "secret" not in json.dumps(result)


def test_a_workload_file(tmp_path: Path) -> None:
    file = tmp_path / "work.json"
    file.write_text(json.dumps({"w": {"reps": [[[1, 2], [3]], [[4, 5], [6]]], "out_lens": [2, 3]}}))
    script = Script()
    _, result = bench(script, tmp_path, "--dataset", "file", "--workload", str(file), "--workload-name", "w")
    assert [body["prompt"] for body in script.seen] == [[1, 2], [4, 5], [6]] and result["output_lens"] == [2, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--endpoint", "/v1/chat/completions", "--vocab-size", "9"], "takes text, not token ids"),
        (["--vocab-size", "9"], "--first-id 100 is not below --vocab-size 9"),
        (["--dataset", "file"], "needs --workload FILE"),
        (["--workload-name", "w2"], "need --dataset file"),
        (["--goodput", "speed:3"], "does not begin with one of ttft, tpot, e2el"),
        (["--goodput", "ttft:0"], "not above 0"),
        (["--burstiness", "0"], "not above 0"),
        (["--metric-percentiles", "101"], "not from 0 to 100"),
        (["--range-ratio", "1"], "not from 0 to below 1"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: Capture) -> None:
    try:
        code = main(["bench", "serve", *flags])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plots" / "run.png"
    code, _ = bench(Script(delays_s=(0.01,)), tmp_path, "--plot", str(file))
    assert code == 0 and file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


def test_a_plot_without_matplotlib_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "serve", "--plot", "x.png"]) == 2
    assert "pip install 'quire-llm[bench]'" in capsys.readouterr().err


def test_events_may_be_cut_anywhere() -> None:
    stream = b'data: {"choices":[{"text":"a"}]}\r\n\r\n: ping\n\ndata: {"choices":[{"text":"b"}]}\n\n'
    stream += b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
    for size in range(1, len(stream)):
        reader = StreamReader()
        for start in range(0, len(stream), size):
            reader.feed(stream[start : start + size], float(start))
        assert len(reader.chunk_times) == 2 and reader.usage() == (3, 2)


def test_an_error_event_ends_the_reading() -> None:
    with pytest.raises(StreamFault, match="too long"):
        StreamReader().feed(b'data: {"error":{"message":"too\\nlong"}}\n', 0.0)
