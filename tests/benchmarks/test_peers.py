"""The parts of the peers' workers that need no peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import model_forms
from benchmarks.compare.environments import PeerEnvironmentError
from benchmarks.compare.llama_batch import Row, Schedule
from benchmarks.compare.model_forms import model_for
from benchmarks.compare.peer import ModelForm
from benchmarks.compare.worker_llama_cpp import LlamaUnderTest, _shared_len
from benchmarks.compare.worker_vllm import preloads

TINY = Path(__file__).resolve().parents[1] / "golden" / "tiny" / "llama"


class Cache:
    """What a library would hold; the next token of a sequence says how many tokens it has there."""

    def __init__(self, prompts: list[list[int]], batch_size: int) -> None:
        self.prompts, self.batch_size = prompts, batch_size
        self.held: dict[int, list[int]] = {}
        self.largest = self.most_sequences = 0

    def compute(self, rows: list[Row]) -> dict[int, int]:
        """Every token must come right after those that are there."""
        for row in rows:
            tokens = self.held.setdefault(row.sequence, [])
            assert row.position == len(tokens)
            tokens.append(row.token)
        self.largest = max(self.largest, len(rows))
        self.most_sequences = max(self.most_sequences, len(self.held))
        return {row.sequence: 1000 + len(self.held[row.sequence]) for row in rows if row.wants_logits}


def _run(prompts: list[list[int]], output_lens: list[int], slots: int, batch: int, shared: int = 0) -> Any:
    cache, schedule = Cache(prompts, batch), Schedule(prompts, output_lens, slots, batch, shared)
    batches = []
    while True:
        for slot in schedule.admit():
            cache.held[slot] = prompts[0][:shared]
        rows = schedule.batch()
        if not rows:
            return cache, schedule.outputs, batches
        batches.append(rows)
        for slot in schedule.commit(rows, cache.compute(rows)):
            del cache.held[slot]


@pytest.mark.parametrize(("slots", "batch"), [(1, 4), (2, 4), (3, 3), (8, 64)])
def test_requests_of_a_schedule_get_exactly_their_tokens(slots: int, batch: int) -> None:
    prompts = [[10 * i + j for j in range(length)] for i, length in enumerate((5, 1, 9, 4, 2))]
    output_lens = [3, 1, 4, 1, 5]
    cache, outputs, _ = _run(prompts, output_lens, slots, batch)
    wanted = zip(prompts, output_lens, strict=True)
    assert outputs == [[1000 + len(prompt) + i for i in range(length)] for prompt, length in wanted]
    assert cache.held == {} and cache.largest <= batch and cache.most_sequences <= slots


def test_generating_requests_go_into_every_batch() -> None:
    _, _, batches = _run([[1], [2] * 12], [6, 1], 2, 4)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 1, 1]
    assert [batch[0].sequence for batch in batches] == [0] * 6


def test_a_shared_prefix_is_not_computed_again() -> None:
    prompts = [[7, 7, 7, 7, i] for i in range(4)]
    assert _shared_len(prompts) == 0  # too short to be worth a copy
    assert _shared_len([[7] * 40 + [i, 0] for i in range(4)]) == 40
    assert _shared_len([[7] * 40, [7] * 50]) == 39  # one token at least is computed
    _, outputs, batches = _run(prompts, [2] * 4, 4, 16, shared=4)
    assert [len(batch) for batch in batches] == [4, 4]
    assert outputs == [[1005, 1006]] * 4


def test_a_batch_holds_one_token_of_every_slot() -> None:
    with pytest.raises(ValueError, match="cannot hold one of each of 5 slots"):
        Schedule([[1]], [1], 5, 4)


def test_llama_cpp_must_be_loaded_first() -> None:
    with pytest.raises(RuntimeError, match="before it was asked to load"):
        LlamaUnderTest().ceilings()


def test_libraries_to_load_first(tmp_path: Path) -> None:
    own, system = tmp_path / "own", tmp_path / "system"
    for directory in (own, system):
        directory.mkdir()
        (directory / "libiomp5.so").touch()
    assert preloads((own, system)) == [str(own / "libiomp5.so")]
    (system / "libtcmalloc_minimal.so.4").touch()
    assert preloads((own, system)) == [str(system / "libtcmalloc_minimal.so.4"), str(own / "libiomp5.so")]


def test_llama_cpp_wants_a_gguf_file_and_gets_it_in_the_runs_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path))
    assert model_for(ModelForm.HF_DIRECTORY, str(TINY), "bfloat16", Path("python")) == str(TINY)
    with pytest.raises(PeerEnvironmentError, match="is not a GGUF file"):
        model_for(ModelForm.GGUF, str(TINY), "bfloat16", Path("python"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    made: list[list[str]] = []

    class Done:
        returncode = 0

    def convert(command: list[str], **_: object) -> Done:
        made.append(command)
        Path(command[3]).touch()
        return Done()

    monkeypatch.setattr(model_forms.subprocess, "run", convert)
    for form, dtype, kind in (
        (ModelForm.GGUF, "bfloat16", "bf16"),
        (ModelForm.GGUF, "float32", "f32"),
        (ModelForm.GGUF_Q8_0, "bfloat16", "q8_0"),
        (ModelForm.GGUF, "bfloat16", None),  # it is there already
    ):
        before = len(made)
        out = model_for(form, str(file), dtype, Path("python"))
        assert (made[-1][4] if len(made) > before else None) == kind
        assert Path(out).is_file()
