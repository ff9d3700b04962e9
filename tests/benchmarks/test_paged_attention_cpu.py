"""The benchmark of attention on a CPU: its workloads are what their names say, and it times real calls."""

from __future__ import annotations

import pytest

from benchmarks import paged_attention_cpu
from benchmarks.paged_attention_cpu import main, num_pairs, parse_case

SHAPE = (2, 1, 16)


def test_workloads() -> None:
    decode, chunk = parse_case("3x20", SHAPE), parse_case("4@10", SHAPE)
    assert (decode.query_lens, decode.context_lens) == ((1, 1, 1), (20, 20, 20))
    assert (chunk.query_lens, chunk.context_lens) == ((4,), (10,))
    assert num_pairs(decode) == 60
    assert num_pairs(chunk) == 7 + 8 + 9 + 10


def test_main_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(paged_attention_cpu, "IMPLEMENTATIONS", ("xla", "xla"))  # a compiler need not be there
    monkeypatch.setattr(paged_attention_cpu, "pin_workers", lambda: 0)
    monkeypatch.setitem(paged_attention_cpu.SHAPES, "SmolLM2-135M", SHAPE)
    main(["--cases", "2x20,4@10", "--layers", "1", "--turns", "1", "--kv-dtype", "int8"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| workload | XLA, µs | native, µs |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 2x20", "| 4@10"]
