"""A recording holds what is needed to run every step again, and a replay sees whatever comes out otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import Engine, SamplingParams
from engine.errors import CacheWriteError, ConfigError
from engine.pooling import PoolingParams
from engine.replay.player import replay
from engine.structured.params import StructuredOutputsParams
from tests.engine.helpers import SMALL, TINY, core_of, parts_of, random_ids

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "adaptive": False}
FEW_BLOCKS = {"num_gpu_blocks_override": 12, "block_size": 8, "max_model_len": 64}


@pytest.fixture
def record(tmp_path: Path, compilation_cache: str) -> Callable[..., Path]:
    """Run a mixed lot of requests on an engine that records; gives the file."""

    def run(**settings: Any) -> Path:
        path = tmp_path / "recording.jsonl"
        every = {
            **SMALL,
            **FEW_BLOCKS,
            "compilation_cache_dir": compilation_cache,
            "max_logprobs": -1,
            "record": path,
            **settings,
        }
        with Engine(str(TINY / "llama"), **every) as engine:
            run_requests(engine)
        return path

    return run


def run_requests(engine: Engine) -> None:
    """Greedy and drawn tokens, penalties, log-probabilities, a grammar, several completions, a pooled prompt."""
    core, inputs = core_of(engine), parts_of(engine).inputs
    prompts = [[5, 6, 7, 8] * 6, *([10 + i, 30 + i, 50 + i] * (2 + i) for i in range(5))]
    params = [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.9, top_k=20, max_tokens=18, ignore_eos=True, seed=3),
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=1.0, max_tokens=12, n=2, seed=4, presence_penalty=0.5),
        SamplingParams(max_tokens=12, structured_outputs=StructuredOutputsParams(regex="[a-z]{3,8}"), seed=1),
        SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=-1),
    ]
    requests = [
        inputs.make(prompt, each, request_id=f"r{i}")
        for i, (prompt, each) in enumerate(zip(prompts, params, strict=True))
    ]
    for request in requests:
        core.add(request)
    core.add(inputs.make_pooled([9, 8, 7, 6, 5], PoolingParams(pooling="mean"), request_id="pooled"))
    steps = 0
    while core.has_work:
        core.step()
        steps += 1
        if steps == 9:
            core.abort("r1")
        assert steps < 2000
    # Alone, so that there is room for drafts; each pair of tokens has stood in the prompt.
    pairs = [token for first in range(20, 30) for second in range(20, 30) for token in (first, second)][:40]
    allowed = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, allowed_token_ids=list(range(20, 24)))
    engine.generate([pairs], allowed, use_tqdm=False)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """All lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="overlap"),
        pytest.param({"async_scheduling": False}, id="in step", marks=pytest.mark.slow),
        pytest.param({"speculative_config": NGRAM}, id="ngram", marks=pytest.mark.slow),
    ],
)
def test_all_steps_come_out_the_same(record: Callable[..., Path], settings: dict[str, Any]) -> None:
    path = record(**settings)
    lines = lines_of(path)
    kinds = {line["event"] for line in lines}
    assert kinds >= {"header", "request", "forward", "sample", "collect"}
    digests = {name for line in lines if line["event"] == "collect" for name in line["digests"]}
    assert digests == {"logprobs", "full_logprobs", "prompt_logprobs", "pooled"}
    assert any(line.get("mask") for line in lines if line["event"] == "sample")
    items = [item for line in lines if line["event"] == "forward" for item in line["items"]]
    assert any(item[11] > 0 for item in items), "no sequence was preempted"
    assert any(item[7] for item in items) == ("speculative_config" in settings), "drafts"
    assert path.stat().st_mode & 0o077 == 0

    report = replay(path, {})
    assert report.difference is None
    assert report.num_steps == sum(line["event"] == "collect" for line in lines)
    assert report.num_tokens > 50


def test_a_changed_result_is_named(record: Callable[..., Path]) -> None:
    path = record()
    lines = lines_of(path)
    changed = next(line for line in lines[len(lines) // 2 :] if line["event"] == "collect" and any(line["tokens"]))
    row = next(row for row in changed["tokens"] if row)
    row[0] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    difference = replay(path, {}).difference
    assert difference is not None
    assert (difference.step, difference.what) == (changed["step"], "tokens")
    assert difference.recorded == str(row) and difference.found == str([row[0] - 1])
    assert "position" in difference.where


@pytest.mark.slow
def test_a_changed_log_probability_is_named(record: Callable[..., Path]) -> None:
    path = record()
    lines = lines_of(path)
    scored = next(line for line in lines if line["event"] == "collect" and "logprobs" in line["digests"])
    scored["digests"]["logprobs"] = "0" * 16
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    difference = replay(path, {}).difference
    assert difference is not None and (difference.step, difference.what) == (scored["step"], "logprobs")


@pytest.mark.slow
def test_other_settings_show_as_other_bits(record: Callable[..., Path]) -> None:
    difference = replay(record(), {"dtype": "bfloat16"}).difference
    assert difference is not None


@pytest.mark.slow
def test_a_failed_step_must_fail_again(record: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One step raised when it was recorded and does not now."""
    from engine.runtime.executor import Executor

    collect, calls = Executor.collect, iter(range(10_000))

    def fail_once(self: Executor, step: Any) -> Any:
        if next(calls) == 4:
            raise RuntimeError("a planted fault")
        return collect(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "collect", fail_once)
        path = record()
    kinds = [line["event"] for line in lines_of(path)]
    assert kinds.count("failed") == kinds.count("reset") == 1
    difference = replay(path, {}).difference
    assert difference is not None and difference.what == "collect" and "a planted fault" in difference.recorded
    calls = iter(range(10_000))
    with monkeypatch.context() as patch:
        patch.setattr(Executor, "collect", fail_once)
        assert replay(path, {}).difference is None


@pytest.mark.slow
def test_a_recording_that_ends_in_the_middle_is_played_as_far_as_it_goes(record: Callable[..., Path]) -> None:
    path = record()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * 0.6)])
    report = replay(path, {})
    assert report.difference is None and report.num_steps > 3


def test_files_that_are_no_recordings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        replay(tmp_path / "absent", {})
    other = tmp_path / "other.json"
    other.write_text('{"model": "demo"}\n')
    with pytest.raises(ConfigError, match="is not a recording"):
        replay(other, {})
    other.write_text('{"event": "header", "version": 99, "settings": {}, "device": "cpu:cpu", "versions": {}}\n')
    with pytest.raises(ConfigError, match="version 99"):
        replay(other, {})


def test_a_full_disk_ends_the_recording_and_nothing_else(
    compilation_cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**SMALL, "compilation_cache_dir": compilation_cache, "record": "/dev/full"}
    with Engine(str(TINY / "llama"), **settings) as engine:
        output = engine.generate([random_prompt()], SamplingParams(max_tokens=4, ignore_eos=True))[0]
    assert len(output.outputs[0].token_ids) == 4
    assert "recording to /dev/full ends here" in caplog.text


def test_a_file_that_cannot_be_made_is_refused_at_the_start(tmp_path: Path, compilation_cache: str) -> None:
    settings = {**SMALL, "compilation_cache_dir": compilation_cache, "record": tmp_path / "no" / "file"}
    with pytest.raises(CacheWriteError, match=r"record='.*' cannot be written"):
        Engine(str(TINY / "llama"), **settings)


def random_prompt() -> list[int]:
    """Any prompt."""
    import numpy as np

    return random_ids(np.random.default_rng(0), 12)
