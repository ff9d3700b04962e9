"""The parts that need a running engine, on a tiny one. Slow: it compiles."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.compare.driver import Comparison, Plan
from benchmarks.compare.journal import Journal
from benchmarks.compare.process import WorkerProcess
from benchmarks.compare.registry import PEERS
from benchmarks.compare.results import metrics_of
from benchmarks.profile_step import markdown, profile
from benchmarks.profiling.categories import OTHER, UNKNOWN
from benchmarks.profiling.traffic import Situation
from benchmarks.workloads.cpu_smollm2 import Workload
from engine.builder import build_engine
from engine.config import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "golden" / "tiny" / "llama"
pytestmark = pytest.mark.slow
SETTINGS = {
    "model": str(TINY),
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 64,
    "compilation_cache_dir": "",
}


def _small(name: str, prompt_lens: tuple[int, ...], output_lens: tuple[int, ...], *, streamed: bool) -> Workload:
    class InVocabulary(Workload):
        def prompts(self, repetition: int) -> list[list[int]]:
            return [[10 + (repetition + i) % 50 for i in range(length)] for length in self.prompt_lens]

    return InVocabulary(name, "small", prompt_lens, output_lens, streamed=streamed)


def test_quires_worker_measures_what_it_is_asked(tmp_path: Path) -> None:
    peer = PEERS["quire"]
    workloads = (_small("w1", (9,), (6,), streamed=True), _small("w4", (5, 12, 3), (4, 7, 2), streamed=False))

    def start(_: object) -> WorkerProcess:
        return WorkerProcess([sys.executable, "-m", peer.module], dict(os.environ), ROOT, tmp_path / "quire.log")

    settings = SETTINGS | {"num_threads": 2}
    journal = Journal(tmp_path, {}, resume=False)
    plan = Plan((peer,), workloads, 1, 300.0)
    with Comparison(plan, start, lambda _: settings, journal, lambda _: None) as comparison:
        comparison.load()
        assert comparison.measure() == 0
    measured = [m for m, _ in journal.measurements]
    assert [m.error for m in measured] == [None] * 4
    assert journal.peers["quire"].versions["jax"]
    streamed = measured[2]
    assert len(streamed.token_times_s) == 6
    assert all(metric.of(workloads[0], streamed) is not None for metric in metrics_of("w1"))


@pytest.mark.parametrize("situation", [Situation("2 rows", 2, 20), Situation("chunk", 0, 32)])
def test_a_profile_adds_up_and_knows_its_instructions(situation: Situation) -> None:
    built = build_engine(EngineConfig.from_flat(**SETTINGS, show_progress=False, skip_tokenizer_init=True))
    found = profile(built, situation, num_steps=6)
    assert sum(found.categories.values()) == pytest.approx(found.traced_s)
    assert UNKNOWN not in found.categories
    for name in ("dots: MLP", "dots: attention projections", "dots: head", "KV write", "attention: dots", "sampling"):
        assert found.categories[name] > 0, name
    assert found.categories.get(OTHER, 0.0) < 0.1 * found.traced_s
    assert found.host["plan"] > 0 and found.step_s > 0
    about = {"model": "tiny", "dtype": "float32", "num_steps": 6, "context": 20}
    about["machine"] = {"processor": "p", "cpu_count": 2, "platform": "x", "versions": {"jax": "1"}}
    assert "| dots: MLP |" in markdown([found], about)
