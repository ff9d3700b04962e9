"""`quire bench` with a fake engine whose times are known."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from serving.bench.workloads import LengthRange, random_repetitions, read_workload
from serving.cli import main
from serving.errors import UsageError
from serving.timing import percentile, summarise
from tests.cli.fake_engine import TPOT_S, TTFT_S, VOCAB_SIZE, FakeEngine, FakeFactory

Capture = pytest.CaptureFixture[str]
SMALL = ["--input-len", "8", "--output-len", "4"]


def bench(*args: str, factory: FakeFactory | None = None) -> tuple[int, FakeEngine]:
    factory = factory or FakeFactory()
    code = main(["bench", *args], engine_factory=factory)
    return code, factory.made


def test_latency_measures_what_it_is_asked_to(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "results" / "latency.json"
    flags = ["--batch-size", "3", "--num-iters", "4", "--warmup", "2", "--block-size", "32", "--json", str(out)]
    code, engine = bench("latency", *SMALL, *flags)
    assert code == 0
    assert engine.settings == {"block_size": 32, "compile_in_background": False}
    assert len(engine.calls) == 6
    for prompts, params in engine.calls:
        assert [len(prompt) for prompt in prompts] == [8, 8, 8]
        assert all(p.ignore_eos and p.is_greedy and p.max_tokens == 4 and p.detokenize for p in params)
    seen = [tuple(prompt) for prompts, _ in engine.calls for prompt in prompts]
    assert len(set(seen)) == len(seen), "no prompt comes twice, so that no cache can help"

    value = json.loads(out.read_text())
    assert len(value["latencies"]) == 4 and list(value["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert value["ttft_s"]["p50"] == TTFT_S and value["tpot_s"]["mean"] == pytest.approx(TPOT_S)
    assert value["decode_tokens_per_s"]["p50"] == pytest.approx(3 / TPOT_S), "3 requests, each 1 token per TPOT"
    assert value["settings"]["batch_size"] == 3 and value["settings"]["block_size"] == 32
    assert value["engine"]["device"] == "cpu" and value["engine_metrics"] == {"compiles_after_ready": 0}
    assert value["machine"]["cpu_count"] >= 1
    text = capsys.readouterr().out
    assert "TTFT" in text and "decode    median 6.0 tokens/s" in text


def test_throughput_reports_the_median_repetition(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "throughput.json"
    code, engine = bench("throughput", "--num-prompts", "5", *SMALL, "--num-iters", "3", "--json", str(out))
    assert code == 0 and len(engine.calls) == 4
    value = json.loads(out.read_text())
    assert (value["num_requests"], value["num_prompt_tokens"], value["num_output_tokens"]) == (5, 40, 20)
    assert value["total_num_tokens"] == 60
    elapsed = sorted(repetition["elapsed_time"] for repetition in value["repetitions"])
    assert value["elapsed_time"] == elapsed[1]
    assert value["output_tokens_per_second"] == pytest.approx(20 / elapsed[1])
    assert value["tokens_per_second"] == pytest.approx(60 / elapsed[1])
    assert value["requests_per_second"] == pytest.approx(5 / elapsed[1])
    assert value["e2e_s"]["p99"] == pytest.approx(TTFT_S + 3 * TPOT_S)
    assert "5 requests, 40 prompt tokens, 20 output tokens" in capsys.readouterr().out


def test_json_to_stdout_has_stdout_for_itself(capsys: Capture) -> None:
    for command in ("latency", "throughput"):
        bench(command, *SMALL, "--num-iters", "1", "--json", "-")
        captured = capsys.readouterr()
        assert json.loads(captured.out)["engine"]["vocab_size"] == VOCAB_SIZE
        assert "TTFT" in captured.err


def test_other_work_than_asked_for_is_no_measurement(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.json"
    for command in ("latency", "throughput"):
        code, _ = bench(command, *SMALL, "--json", str(out), factory=FakeFactory(lose_tokens=1))
        assert code == 1
        assert "ended after 3 tokens (length) instead of 4" in capsys.readouterr().err
        code, _ = bench(command, *SMALL, "--json", str(out), factory=FakeFactory(fail_with="broken"))
        assert code == 1 and "failed: broken" in capsys.readouterr().err
    assert not out.exists()


def test_without_a_tokenizer_there_is_no_text() -> None:
    _, engine = bench("latency", *SMALL, "--num-iters", "1", "--skip-tokenizer-init")
    assert not engine.calls[0][1][0].detokenize
    _, engine = bench("throughput", *SMALL, "--num-iters", "1", "--no-detokenize")
    assert not engine.calls[0][1][0].detokenize


def test_random_repetitions_are_seeded_and_within_range() -> None:
    lengths = (LengthRange(3, 9), LengthRange(2, 5))
    first = random_repetitions(2, 50, lengths, vocab_size=10, seed=1)
    assert first == random_repetitions(2, 50, lengths, vocab_size=10, seed=1)
    assert first != random_repetitions(2, 50, lengths, vocab_size=10, seed=2)
    shapes = [[(len(r.prompt_token_ids), r.output_len) for r in repetition] for repetition in first]
    assert shapes[0] == shapes[1], "all repetitions have the same lengths"
    assert first[0] != first[1], "but not the same tokens"
    assert {p for p, _ in shapes[0]} == set(range(3, 10)) and {o for _, o in shapes[0]} == set(range(2, 6))
    assert {t for r in first[0] for t in r.prompt_token_ids} == set(range(10))


def test_length_ranges() -> None:
    assert LengthRange.parse("128") == LengthRange(128, 128)
    assert LengthRange.parse("100:1024") == LengthRange(100, 1024) and str(LengthRange(100, 1024)) == "100:1024"
    for text in ("", "x", "0", "5:4", "1:2:3", "1:"):
        with pytest.raises(argparse.ArgumentTypeError):
            LengthRange.parse(text)


WORKLOADS: dict[str, Any] = {
    "about": "a test",
    "w1": {"prompt_len": 2, "out_len": 3, "reps": [[1, 2], [3, 4], [5, 6]]},
    "w2": {"prompt_lens": [1, 2], "out_lens": [4, 5], "reps": [[[1], [2, 3]], [[4], [5, 6]]]},
    "w4": {"out_len": 2, "reps": [{"prefix": [1, 2], "suffixes": [[3], [4]]}]},
    "short": {"out_lens": [4], "reps": [[[1], [2]]]},
    "zero": {"out_len": 0, "reps": [[1]]},
    "text": {"out_len": 2, "reps": ["abc"]},
    "empty": {"out_len": 2, "reps": [[]]},
    "prefix": {"out_len": 2, "reps": [{"prefix": [1]}]},
    "negative": {"out_len": 2, "reps": [[-1]]},
}


@pytest.fixture
def workload_file(tmp_path: Path) -> Path:
    path = tmp_path / "workloads.json"
    path.write_text(json.dumps(WORKLOADS))
    return path


def test_workload_files_have_three_shapes(workload_file: Path) -> None:
    def read(name: str) -> list[list[tuple[list[int], int]]]:
        return [[(r.prompt_token_ids, r.output_len) for r in rep] for rep in read_workload(workload_file, name)]

    assert read("w1") == [[([1, 2], 3)], [([3, 4], 3)], [([5, 6], 3)]]
    assert read("w2") == [[([1], 4), ([2, 3], 5)], [([4], 4), ([5, 6], 5)]]
    assert read("w4") == [[([1, 2, 3], 2), ([1, 2, 4], 2)]]


@pytest.mark.parametrize("name", ["short", "zero", "text", "empty", "prefix", "negative", "about", "missing"])
def test_other_shapes_are_refused(workload_file: Path, name: str) -> None:
    with pytest.raises(UsageError):
        read_workload(workload_file, name)


def test_files_that_are_no_workloads_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("{", "[1]"):
        path.write_text(text)
        with pytest.raises(UsageError):
            read_workload(path, "w1")
    with pytest.raises(UsageError, match="cannot read"):
        read_workload(tmp_path / "missing.json", "w1")


def test_throughput_runs_a_workload_file(workload_file: Path, capsys: Capture) -> None:
    flags = ["--workload", str(workload_file), "--workload-name", "w2", "--num-iters", "1"]
    code, engine = bench("throughput", *flags)
    assert code == 0
    assert [prompts for prompts, _ in engine.calls] == [[[1], [2, 3]], [[4], [5, 6]]]
    assert [[p.max_tokens for p in params] for _, params in engine.calls] == [[4, 5], [4, 5]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workload", "FILE"], "--workload needs --workload-name"),
        (["--workload-name", "w1"], "--workload-name needs --workload"),
        (["--workload", "FILE", "--workload-name", "w4"], "has 1 repetitions of w4, but --warmup 1 and --num-iters 3"),
        (["--workload", "FILE", "--workload-name", "w9"], "has no workload 'w9'; it has: w1, w2, w4"),
    ],
)
def test_contradicting_workload_flags(flags: list[str], message: str, workload_file: Path, capsys: Capture) -> None:
    factory = FakeFactory()
    argv = ["bench", "throughput", *(str(workload_file) if flag == "FILE" else flag for flag in flags)]
    assert main(argv, engine_factory=factory) == 2
    assert message in capsys.readouterr().err
    assert factory.engine is None, "found before the model is loaded"


def test_a_workload_of_another_vocabulary_is_refused(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"w": {"out_len": 1, "reps": [[VOCAB_SIZE]]}}))
    code, engine = bench(
        "throughput", "--workload", str(path), "--workload-name", "w", "--num-iters", "1", "--warmup", "0"
    )
    assert code == 2 and engine.calls == []
    assert f"token id {VOCAB_SIZE}, but the model's vocabulary ends at {VOCAB_SIZE - 1}" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--num-iters", "--batch-size", "--input-len", "--output-len"])
def test_counts_start_at_one(flag: str, capsys: Capture) -> None:
    for value in ("0", "-1", "x"):
        with pytest.raises(SystemExit):
            main(["bench", "latency", flag, value])


def test_percentiles_are_numpys() -> None:
    numpy = pytest.importorskip("numpy")
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    for percent in (0, 10, 33, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(numpy.percentile(values, percent)))
    assert summarise([]) == {} and summarise([2.0])["std"] == 0.0
    with pytest.raises(ValueError):
        percentile([], 50)
