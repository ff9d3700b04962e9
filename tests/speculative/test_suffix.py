"""Suffix decoding: what follows the longest match most often, in the sequence and in outputs of the past."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.requests.request import Request
from engine.requests.sequence import Sequence
from engine.sampling_params import SamplingParams
from engine.speculative import corpus as corpus_module
from engine.speculative.corpus import BORDER, RUN, Corpus
from engine.speculative.history import History
from engine.speculative.suffix import SuffixOptions, SuffixProposer

OPTIONS = {"num_drafts": 4, "max_depth": 8, "spec_factor": 4.0, "least_prob": 0.1, "most_outputs": 100}


def proposer_of(**changes: float) -> SuffixProposer:
    return SuffixProposer(SuffixOptions(**{**OPTIONS, **changes}))  # type: ignore[arg-type]


def sequence_of(prompt: list[int], outputs: list[int], salt: str | None = None) -> Sequence:
    request = Request("r", None, tuple(prompt), SamplingParams(), (), (), 0, 0, salt, 0.0)
    sequence = Sequence(request)
    sequence.output_token_ids = list(outputs)
    return sequence


def proposed(proposer: SuffixProposer, prompt: list[int], outputs: list[int], salt: str | None = None) -> tuple:
    """After tokens that came one by one, with a guess after each."""
    sequence = sequence_of(prompt, [], salt)
    for token in outputs:
        sequence.output_token_ids.append(token)
        proposer.extend(sequence)
        proposer.propose(sequence)
    drafts = proposer.propose(sequence)
    proposer._trails.clear()  # nothing of it is kept for later
    return drafts


def past(proposer: SuffixProposer, output: list[int], salt: str | None = None) -> None:
    sequence = sequence_of([1], output, salt)
    proposer.extend(sequence)
    proposer.forget(sequence)


def test_what_followed_most_often() -> None:
    """Twice 5, once 6, and 6 came last."""
    prompt = [1, 2, 5, 7, 1, 2, 5, 7, 1, 2, 6, 9]
    assert proposed(proposer_of(), prompt, [1, 2]) == (5, 7, 1, 2)
    assert proposed(proposer_of(least_prob=0.7), prompt, [1, 2]) == (), "two in three is not enough"
    assert proposed(proposer_of(), [1, 2, 5, 1, 2, 6], [1, 2])[0] == 6, "of equals the latest"


def test_the_longest_match_decides() -> None:
    prompt = [8, 1, 2, 5, 5, 9, 1, 2, 6, 6, 9, 1, 2, 6, 6]
    assert proposed(proposer_of(), prompt, [8, 1, 2])[:2] == (5, 5)


def test_a_long_match_deserves_a_long_draft() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for matched in (1, 2, 3):
        start = [20] if matched == 1 else []
        drafts = proposed(proposer_of(spec_factor=1.0), prompt, [*start, *prompt[:matched]])
        assert drafts == tuple(prompt[matched : 2 * matched])
    assert proposed(proposer_of(spec_factor=0.5), prompt, [1, 2, 3]) == (4,)
    assert len(proposed(proposer_of(max_depth=2, spec_factor=1.0), prompt, [1, 2, 3, 4])) == 2


def test_text_in_a_loop_goes_on() -> None:
    assert proposed(proposer_of(), [9], [1, 2, 1, 2]) == (1, 2, 1, 2)
    assert proposed(proposer_of(), [9], [4, 4]) == (4, 4, 4, 4)


def test_outputs_of_the_past() -> None:
    proposer = proposer_of()
    past(proposer, [11, 12, 13, 14, 15, 16])
    assert proposed(proposer, [7], [11, 12]) == (), "two tokens are no match with the past"
    assert proposed(proposer, [7], [11, 12, 13]) == (14, 15, 16)
    assert proposed(proposer, [7, 11, 12, 13, 60, 61, 62, 63], [11, 12, 13]) == (60, 61, 62, 63), "its own goes first"
    assert proposed(proposer, [7, 13, 60, 13, 61, 13, 62], [11, 12, 13]) == (14, 15, 16), "one in three, or sure"


def test_salts_share_nothing() -> None:
    proposer = proposer_of()
    past(proposer, [11, 12, 13, 14, 15], salt="a")
    assert proposed(proposer, [7], [11, 12, 13], salt="a") == (14, 15)
    assert proposed(proposer, [7], [11, 12, 13], salt="b") == ()
    assert proposed(proposer, [7], [11, 12, 13]) == ()


def test_the_oldest_output_goes_first() -> None:
    proposer = proposer_of(most_outputs=2)
    for number, salt in enumerate(("a", "a", "b")):
        past(proposer, [100 * number + i for i in range(6)], salt)
    assert proposed(proposer, [7], [0, 1, 2], "a") == ()
    assert proposed(proposer, [7], [100, 101, 102], "a") == (103, 104, 105)
    past(proposer, [300 + i for i in range(6)], "b")
    assert set(proposer._corpora) == {"b"}, "nothing is left of the other salt"
    assert set(proposer_of(most_outputs=0)._corpora) == set()


def test_no_past_is_kept_if_none_is_wanted() -> None:
    proposer = proposer_of(most_outputs=0)
    past(proposer, [11, 12, 13, 14, 15])
    assert proposed(proposer, [7], [11, 12, 13]) == () and not proposer._trails


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 3), st.integers(3, 6))
def test_matches_as_by_hand(tokens: list[int], size: int, longest: int) -> None:
    history = History(size)
    for cut in (len(tokens) // 2, len(tokens)):
        history.extend(tokens[len(history.tokens) : cut])
    found = {}
    for place in range(size, len(tokens)):
        matched = 0
        while matched < min(longest, place) and tokens[place - matched - 1] == tokens[len(tokens) - matched - 1]:
            matched += 1
        if matched >= size:
            found[place] = matched
    places, matched = history.longest_matches(longest, 1000)
    assert matched == max(found.values(), default=0)
    assert places == sorted((place for place, length in found.items() if length == matched), reverse=True)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=RUN + 1, max_size=40), min_size=1, max_size=30), st.data())
def test_a_corpus_as_by_hand(outputs: list[list[int]], data: st.DataObject) -> None:
    """Matches in what is kept, whatever was overwritten, moved by growth or dropped meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "FIRST_SLOTS", 64)
        patch.setattr(corpus_module, "MOST_SLOTS", 256)
        corpus, kept = Corpus(), []
        for output in outputs:
            del kept[: corpus.add(output)]
            kept.append(output)
            if data.draw(st.booleans()) and len(kept) > 1:
                corpus.drop_oldest()
                del kept[0]
    assert corpus.num_outputs == len(kept) and corpus.num_slots <= 256
    ring = np.asarray(corpus.tokens).tolist()
    assert sum(token != BORDER for token in ring) == sum(map(len, kept))
    for query in kept:
        tokens = query[: data.draw(st.integers(RUN, len(query) - 1))]
        best = 0
        for output in kept:
            for place in range(RUN, len(output)):
                matched = 0
                while matched < min(6, place, len(tokens)) and output[place - matched - 1] == tokens[-matched - 1]:
                    matched += 1
                best = max(best, matched)
        places, matched = corpus.longest_matches(tokens, 6, 10_000)
        assert matched == (best if best >= RUN else 0)
        for place in places:
            assert ring[place - matched : place] == tokens[-matched:]


def test_a_match_in_outputs_that_are_gone() -> None:
    """Its places mean nothing in the corpus that has taken the place of theirs, which is smaller."""
    proposer = proposer_of(most_outputs=1)
    past(proposer, [*range(1000, 2500), 11, 12, 13, 14, 15, 16], salt="a")
    sequence = sequence_of([7], [11, 12, 13], salt="a")
    proposer.extend(sequence)
    assert proposer.propose(sequence) == (14, 15, 16)
    past(proposer, [1, 2, 3, 4, 5], salt="b")
    past(proposer, [11, 12, 13, 14, 20, 21], salt="a")
    sequence.output_token_ids.append(14)
    proposer.extend(sequence)
    assert proposer.propose(sequence) in ((15, 16), (20, 21))
    sequence.output_token_ids.append(20)
    proposer.extend(sequence)
    assert proposer.propose(sequence) == (21,)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([1, 3, 40]))
def test_any_traffic(seed: int, most_outputs: int, longest: int) -> None:
    """Whoever comes and goes: at most as many drafts as asked for, and never a token of another salt."""
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "FIRST_SLOTS", 16)
        patch.setattr(corpus_module, "MOST_SLOTS", 128)
        proposer = proposer_of(most_outputs=most_outputs)
        live: list[Sequence] = []
        for _ in range(150):
            if len(live) < 4:
                salt = int(rng.integers(3))
                live.append(sequence_of([100 * salt + 50], [], salt=str(salt)))
            at = int(rng.integers(len(live)))
            sequence = live[at]
            base = 100 * int(sequence.request.cache_salt or 0)
            sequence.output_token_ids += (base + rng.integers(0, 3, rng.integers(1, longest + 1))).tolist()
            proposer.extend(sequence)
            drafts = proposer.propose(sequence)
            assert len(drafts) <= 4 and all(base <= token <= base + 50 for token in drafts)
            if rng.random() < 0.2:
                proposer.forget(live.pop(at))
            assert sum(corpus.num_outputs for corpus in proposer._corpora.values()) == len(proposer._salts)
            assert len(proposer._salts) <= most_outputs
    assert set(proposer._trails) <= set(live)
