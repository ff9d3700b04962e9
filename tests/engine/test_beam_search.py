"""Beam search against exhaustive enumeration, and against a beam search over tables of log-probabilities."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from engine.beam_search import beam_search
from engine.engine import Engine
from engine.errors import InvalidRequestError, RequestFailedError
from engine.outputs import BeamSearchOutput
from engine.sampling_params import BeamSearchParams, SamplingParams
from tests.engine.conftest import MakeEngine
from tests.engine.helpers import VOCAB, core_of, inputs_of, largest_difference, parts_of

PROMPT = (68, 300, 12, 45, 7)
ENDS = tuple(range(3, 90))  # a quarter of the vocabulary ends a beam: the model's own single EOS hardly ever comes up
CLOSE = 1e-3


class Tables:
    """log p(next | tokens) of the whole vocabulary, float64[V], from requests of one token."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def of(self, contexts: list[tuple[int, ...]]) -> np.ndarray:
        """float64[n, V]."""
        missing = [c for c in dict.fromkeys(contexts) if c not in self._known]
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
        for context, output in zip(missing, self._engine.generate(missing, params) if missing else [], strict=True):
            assert output.outputs[0].logprobs is not None
            found = output.outputs[0].logprobs[0]
            self._known[context] = np.array([found[t].logprob for t in range(VOCAB)])
        return np.stack([self._known[c] for c in contexts])


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    """With no limit to the number of candidates."""
    return make_engine(max_logprobs=-1)


@cache
def tables_of(engine: Engine) -> Tables:
    """Shared by the tests."""
    return Tables(engine)


def search(engine: Engine, params: BeamSearchParams, ends: tuple[int, ...]) -> BeamSearchOutput:
    """The engine's beam search with end tokens of the test's choice."""
    request = inputs_of(engine).make(list(PROMPT), SamplingParams(max_tokens=params.max_tokens))
    return beam_search(request, params, ends, parts_of(engine).tokenizer, engine._run_quietly)


def enumerate_all(engine: Engine, ends: tuple[int, ...], penalty: float) -> list[tuple[float, float, tuple[int, ...]]]:
    """(score, logprob, tokens) of every completion of at most two tokens, best first."""
    tables = tables_of(engine)
    first = tables.of([PROMPT])[0]
    second = tables.of([(*PROMPT, token) for token in range(VOCAB)])
    found = []
    for a in range(VOCAB):
        if a in ends:
            found.append((first[a], first[a], (a,)))
        else:
            totals = first[a] + second[a]
            found += [(totals[b] / 2**penalty, totals[b], (a, b)) for b in range(VOCAB)]
    return sorted(found, reverse=True)


def reference_search(
    engine: Engine, width: int, max_tokens: int, ends: tuple[int, ...], penalty: float
) -> list[tuple[float, tuple[int, ...]]]:
    """(logprob, tokens) of the best beams: the textbook's algorithm, each beam offering its 2 * width best tokens."""

    def score(entry: tuple[float, tuple[int, ...]]) -> float:
        return entry[0] / len(entry[1]) ** penalty

    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    complete: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(max_tokens):
        rows = tables_of(engine).of([(*PROMPT, *tokens) for _, tokens in live])
        grown = []
        for (logprob, tokens), row in zip(live, rows, strict=True):
            for token in np.argsort(-row, kind="stable")[: 2 * width].tolist():
                (complete if token in ends else grown).append((logprob + row[token], (*tokens, token)))
        live = sorted(grown, key=score, reverse=True)[:width]
        if not live:
            break
    return sorted([*complete, *live], key=score, reverse=True)[:width]


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("ends", [(), ENDS], ids=["no end", "many ends"])
def test_wide_beams_find_the_best_of_all(ends: tuple[int, ...], penalty: float, engine: Engine) -> None:
    best = enumerate_all(engine, ends, penalty)[:6]
    params = BeamSearchParams(beam_width=64, max_tokens=2, length_penalty=penalty)
    found = search(engine, params, ends).sequences
    assert len(found) == 64
    assert [s.token_ids[len(PROMPT) :] for s in found[:6]] == [tokens for _, _, tokens in best]
    assert largest_difference([s.cumulative_logprob for s in found[:6]], [logprob for _, logprob, _ in best]) < CLOSE
    for sequence in found:
        assert sequence.token_ids[: len(PROMPT)] == PROMPT
        assert (sequence.finish_reason == "stop") == (sequence.token_ids[-1] in ends)


@pytest.mark.parametrize(("width", "max_tokens"), [(1, 6), (3, 8), (10, 4), (12, 4)])
@pytest.mark.parametrize("ends", [(), ENDS], ids=["no end", "many ends"])
def test_narrow_beams_follow_the_algorithm(width: int, max_tokens: int, ends: tuple[int, ...], engine: Engine) -> None:
    expected = reference_search(engine, width, max_tokens, ends, 1.0)
    found = search(engine, BeamSearchParams(beam_width=width, max_tokens=max_tokens), ends).sequences
    assert [s.token_ids[len(PROMPT) :] for s in found] == [tokens for _, tokens in expected]
    assert largest_difference([s.cumulative_logprob for s in found], [logprob for logprob, _ in expected]) < CLOSE


def test_one_beam_is_greedy(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True, logprobs=0)
    greedy = engine.generate([list(PROMPT)], params)[0].outputs[0]
    beam = engine.beam_search(list(PROMPT), BeamSearchParams(beam_width=1, max_tokens=7, ignore_eos=True))[0].sequences
    assert [s.token_ids[len(PROMPT) :] for s in beam] == [greedy.token_ids]
    assert beam[0].cumulative_logprob == pytest.approx(greedy.cumulative_logprob, abs=CLOSE)
    assert beam[0].text == greedy.text


def test_several_prompts_and_the_context(engine: Engine) -> None:
    outputs = engine.beam_search(["one", [5, 6]], BeamSearchParams(beam_width=2, max_tokens=3))
    assert [len(o.sequences) for o in outputs] == [2, 2]
    assert all(len(s.token_ids) == 5 for s in outputs[1].sequences)
    limit = engine.describe()["max_model_len"]
    capped = engine.beam_search([[5] * (limit - 2)], BeamSearchParams(beam_width=2, max_tokens=50))[0].sequences
    assert {len(s.token_ids) for s in capped} == {limit}


def test_the_text_of_the_end_token(engine: Engine) -> None:
    for shown in (False, True):
        params = BeamSearchParams(beam_width=4, max_tokens=3, include_stop_str_in_output=shown)
        stopped = [s for s in search(engine, params, ENDS).sequences if s.finish_reason == "stop"]
        assert stopped
        for sequence in stopped:
            tokens = sequence.token_ids[len(PROMPT) :]
            assert sequence.text == engine.get_tokenizer().decode(tokens if shown else tokens[:-1])


def test_a_failed_step_fails_the_search(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(core_of(engine).executor, "collect", fail)
        with pytest.raises(RequestFailedError, match="injected"):
            engine.beam_search(list(PROMPT), BeamSearchParams(beam_width=2, max_tokens=3))
    assert engine.beam_search(list(PROMPT), BeamSearchParams(beam_width=2, max_tokens=3))


@pytest.mark.parametrize(
    ("field", "value"),
    [("beam_width", 0), ("beam_width", 65), ("max_tokens", 0), ("temperature", -1.0), ("length_penalty", float("nan"))]
    + [("length_penalty", 1e4), ("ignore_eos", "yes"), ("include_stop_str_in_output", 1)],
)
def test_bad_parameters(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, field: value})
    assert caught.value.parameter == field and repr(value) in str(caught.value)
