"""The workloads are the committed ones, whatever machine makes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.workloads import cpu_smollm2
from benchmarks.workloads.cpu_smollm2 import VOCAB_HIGH, VOCAB_LOW, WORKLOADS, as_file, check, fingerprint
from serving.bench.workloads import read_workload


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_ids_have_the_committed_hash(name: str) -> None:
    check(WORKLOADS[name])


def test_first_ids_are_as_in_the_file_that_the_hash_stands_for() -> None:
    assert WORKLOADS["w1"].prompts(0)[0][:4] == [3144, 18392, 36724, 38391]
    assert WORKLOADS["w2"].prompts(0)[0][:4] == [25712, 10650, 2118, 27084]
    assert WORKLOADS["w3"].prompts(0)[0][:4] == [12801, 29826, 41717, 30432]
    assert WORKLOADS["w4"].prompts(0)[31][:4] == [6724, 44752, 40237, 17428]


def test_other_ids_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_smollm2, "SEED", 1)
    with pytest.raises(RuntimeError, match="the token ids of w3 have hash"):
        check(WORKLOADS["w3"])


def test_sizes() -> None:
    sizes = {name: (w.num_requests, w.num_prompt_tokens, w.num_output_tokens) for name, w in WORKLOADS.items()}
    assert sizes == {"w1": (1, 128, 128), "w2": (64, 14080, 11519), "w3": (1, 2048, 1), "w4": (32, 17408, 1024)}


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_repetitions_share_lengths_but_no_ids(name: str) -> None:
    workload = WORKLOADS[name]
    first, second = workload.prompts(1), workload.prompts(2)
    assert [len(prompt) for prompt in first] == list(workload.prompt_lens) == [len(prompt) for prompt in second]
    assert all(a[:8] != b[:8] for a, b in zip(first, second, strict=True))
    assert all(VOCAB_LOW <= token < VOCAB_HIGH for prompt in first for token in prompt)


def test_w4_shares_its_prefix_and_nothing_more() -> None:
    prompts = WORKLOADS["w4"].prompts(3)
    assert len({tuple(prompt[:512]) for prompt in prompts}) == 1
    assert len({tuple(prompt[512:]) for prompt in prompts}) == 32


def test_a_cut_keeps_the_first_ids_and_says_so() -> None:
    cut = WORKLOADS["w2"].cut(16, 48)
    assert cut.prompts(1) == WORKLOADS["w2"].prompts(1)[:16]
    assert max(cut.output_lens) == 48 and cut.num_requests == 16
    assert "CUT to 16 requests" in cut.about
    assert replace(cut, about="") != replace(WORKLOADS["w2"], about="")


def test_the_file_is_what_quire_bench_reads(tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    file.write_text(json.dumps(as_file(2)))
    for name, workload in WORKLOADS.items():
        repetitions = read_workload(file, name)
        assert [[r.prompt_token_ids for r in repetition] for repetition in repetitions] == [
            workload.prompts(0),
            workload.prompts(1),
        ]
        assert [r.output_len for r in repetitions[0]] == list(workload.output_lens)


def test_equal_workloads_have_equal_fingerprints_and_others_do_not() -> None:
    assert fingerprint(WORKLOADS["w1"]) == fingerprint(replace(WORKLOADS["w1"]))
    assert fingerprint(WORKLOADS["w1"]) != fingerprint(WORKLOADS["w1"].cut(1, 128).cut(0, 0))
