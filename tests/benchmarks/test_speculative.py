"""The benchmark of speculative decoding: its workloads, what it makes of its figures, and a tiny run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import proposer_cost, speculative
from benchmarks.speculative_report import Cell, Turn, markdown, speedup
from benchmarks.workloads.speculation import NUM_CHATS, WORKLOADS

FACTS = {
    "date": "2026-01-02",
    "machine": {"processor": "Z80", "cpu_count": 1},
    "model": "tiny",
    "repetitions": 3,
    "quick": False,
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_repetition_asks_something_else(name: str) -> None:
    workload = WORKLOADS[name]
    first, second = workload.messages(0), workload.messages(1)
    assert first == workload.messages(0) and len(set(first)) == NUM_CHATS
    assert not any("{" in message for message in first)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < NUM_CHATS / 2


def test_the_first_eight_have_every_task_and_every_text() -> None:
    messages = WORKLOADS["copy"].messages(3)[:8]
    marks = ("ferry", "hens", "school trip", "clock above", "garden club", "lake north", "chairs", "beach")
    assert sorted(mark for message in messages for mark in marks if mark in message) == sorted(marks)
    assert len({message[:40] for message in messages}) == 8


def cell(streams: int = 1, lane: str = "ngram", **changes: object) -> Cell:
    turn = {
        "plain_s": 3.0,
        "guessing_s": 1.5,
        "plain_decode_s": 2.0,
        "guessing_decode_s": 0.5,
        "num_requests": 8,
        "num_output_tokens": 80,
        "num_same": 8,
        "num_drafts": 10,
        "num_draft_tokens": 30,
        "accepted_per_pos": (8, 6, 2),
        **changes,
    }
    turns = [Turn(**{**turn, "plain_s": seconds}) for seconds in (3.0, 1.5, 4.5)]  # type: ignore[arg-type]
    return Cell("float32", lane, "copy", streams, turns)


def test_the_report() -> None:
    assert speedup(cell()) == (2.0, 1.0, 3.0)
    report = markdown(
        [cell(), cell(4), cell(4, "suffix", num_drafts=0, num_draft_tokens=0, accepted_per_pos=())], FACTS
    )
    assert "| ngram | 2.00× (1.00–3.00) | 2.00× (1.00–3.00) |" in report
    assert "| ngram: decode | 4.00× (4.00–4.00) | 4.00× (4.00–4.00) |" in report
    assert "| suffix |  | 2.00× (1.00–3.00) |" in report, "a cell that was not measured is empty"
    assert "| ngram | 1 | 3.0 | 53% | 80% 60% 20% | 1.25 | 100% |" in report
    assert "| suffix | 4 | – | – | – | 1.00 | 100% |" in report
    assert "| without, output tok/s | 27 | 27 |" in report


def test_lanes() -> None:
    found = speculative.lanes(
        ["ngram", '{"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 3}'], "both"
    )
    assert list(found) == [
        "ngram k=7, adaptive",
        "ngram k=7, always",
        "ngram k=8 prompt_lookup_max=3, adaptive",
        "ngram k=8 prompt_lookup_max=3, always",
    ]
    assert found["ngram k=7, always"] == {"method": "ngram", "num_speculative_tokens": 7, "adaptive": False}
    assert list(speculative.lanes(["suffix"], "on")) == ["suffix k=7, adaptive"]
    packed = '{"method": "layer_skip", "quantization": "int8", "model": "a/directory/somewhere"}'
    assert list(speculative.lanes([packed], "on")) == ["layer_skip k=7 quantization=int8 model=…, adaptive"]


def test_cells_of_an_earlier_run_are_read_back(tmp_path: Path) -> None:
    assert speculative._earlier_cells(tmp_path) == []
    cells = [cell(), cell(4, "suffix", accepted_per_pos=(2, 1))]
    speculative._write(tmp_path, FACTS, cells)
    assert speculative._earlier_cells(tmp_path) == cells


@pytest.mark.slow
def test_a_tiny_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert speculative.main(["--quick", "--method", "ngram", "--workload", "copy", "--out", str(tmp_path)]) == 0
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [cell["streams"] for cell in cells] == [1, 2]
    assert all(turn["num_same"] == turn["num_requests"] for cell in cells for turn in cell["turns"])
    assert "QUICK LOOK" in (tmp_path / "report.md").read_text() and (tmp_path / "speedup.png").stat().st_size > 1000


@pytest.mark.slow
def test_what_guesses_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert proposer_cost.main(["--sequences", "1,4", "--steps", "40", "--out", str(tmp_path)]) == 0
    costs = json.loads((tmp_path / "results.json").read_text())["costs"]
    assert {(cost["method"], cost["num_seqs"]) for cost in costs} == {
        (m, n) for m in ("ngram", "suffix") for n in (1, 4)
    }
    assert all(cost["guess_us"] > 0 and cost["whole_us"] > 0 for cost in costs)
    assert "suffix: whole speculator" in capsys.readouterr().out
