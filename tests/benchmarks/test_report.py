"""What a reader of the report sees."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.compare.report import markdown, spread
from benchmarks.compare.results import Summary
from tests.benchmarks.comparisons import example, example_of_streams

TEXT = markdown(example(), "quire")


def _row(title: str, engine: str) -> list[str]:
    section = TEXT.split(f"## {title}")[1].split("\n## ")[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {engine} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_medians_with_spread_and_counts() -> None:
    row = _row("W2", "quire")
    assert row[1] == "863.9 (576.0–1151.9)"  # 11519 / 10 and / 20: median of the rates is their mean
    assert row[-2:] == ["2", "0"]


def test_disturbed_repetitions_are_marked() -> None:
    assert "**1 disturbed**" in _row("W2", "peer (batch-all)")[-3]
    assert "disturbed" not in _row("W2", "quire")[-3]


def test_agreement_with_the_reference() -> None:
    assert "75 %" in _row("W2", "peer (batch-all)")
    assert "75 %" not in _row("W2", "quire")


def test_cached_tokens_are_shown_for_w4() -> None:
    assert "480 (480–480)" in _row("W4", "quire")


def test_failures_are_counted_and_named() -> None:
    assert _row("W4", "peer")[-2:] == ["1", "1"]
    assert "- w4, repetition 2, peer: WorkerError: out of memory" in TEXT


def test_ratios_ceilings_and_provenance() -> None:
    assert "| W2 | output tok/s | peer (batch-16-sorted) | 3.00 | 3.00 (3.00–3.00) |" in TEXT
    assert "GEMM, numpy bfloat16: 1 GFLOP/s" in TEXT
    for fact in ("Abacus, 2 cores", "abc123", "2026-01-02", "torch 2.13.0", "12.0"):
        assert fact in TEXT


def test_a_quick_look_says_so_and_a_measurement_does_not() -> None:
    assert "NOT A MEASUREMENT" in markdown(example(cut=True), "quire")
    assert "NOT A MEASUREMENT" not in TEXT


def test_nothing_measured_is_a_dash() -> None:
    assert spread(None, 1) == "–"
    assert spread(Summary(1.25, 1.0, 2.0, 3), 1) == "1.2 (1.0–2.0)"


def test_streams_are_one_table_of_each_engines_best_way() -> None:
    text = markdown(example_of_streams(), "quire")
    table = text.split("## Output tok/s by number of streams: each 64 in, 32 out")[1].split("##")[0]
    assert "| engine | 1 | 8 |" in table
    assert "| quire | 64.0 (64.0–64.0) | 256.0 (256.0–256.0) | 2 % (2–2) | 0 |" in table
    assert "| peer | – | 128.0 (128.0–128.0) | 2 % (2–2) | 1 |" in table
    assert "## S8" not in text and "| S8 |" not in text


def test_starts_have_columns_only_if_they_were_timed() -> None:
    text = markdown(example_of_streams(), "quire")
    assert "| cold start s | warm start s |" in text and "| cold start s" not in TEXT
    assert "| 12.0 | 40.0 (40.0–40.0) | 10.0 (10.0–10.0), **1 disturbed** |" in text
    assert "| 6.0 | –, **1 failed** | – |" in text


def test_what_was_not_measured_has_its_reason() -> None:
    assert "## Not measured\n\n- peer, W4, W3: it has no cache\n" in TEXT


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is of the bench extra")
def test_plots_are_drawn(tmp_path: Path) -> None:
    from benchmarks.compare.plots import draw

    files = draw(example(), tmp_path)
    assert [file.name for file in files] == ["workloads.png", "itl.png"]
    files += draw(example_of_streams(), tmp_path)
    assert [file.name for file in files[2:]] == ["workloads.png", "throughput.png", "itl.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
