"""Generation that follows grammars: always, in any company, whatever else is asked for, and harming nobody."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine.core import EngineCore
from engine.engine import Engine
from engine.runtime.executor import Executor, StartedStep
from engine.sampling_params import RequestOutputKind, SamplingParams
from tests.engine.conftest import MakeEngine
from tests.engine.helpers import TINY, core_of, drive, inputs_of, random_ids, tokens_of
from tests.structured.helpers import SETTINGS, following, free, only
from tests.structured.schemas import collection

EOS = 2
QUOTE, DIGITS = 4, range(18, 28)
PERSON = collection()["person"]
SUBSET = list(collection())[:30]
LIST_OF_DIGITS = "(\\[[0-9]{1,3}\\]){3,9}"


def require_valid(engine: Engine, names: Sequence[str], options: dict[str, Any]) -> float:
    """Generate for schemas and validate all outputs that end with "stop". Returns the fraction that does."""
    schemas, prompts = collection(), [[5 + index % 7, 9] for index in range(len(names))]
    params = [following(json=schemas[name], **options, sampling={"seed": seed}) for seed, name in enumerate(names)]
    stopped = 0
    for name, output in zip(names, engine.generate(prompts, params), strict=True):
        completion = output.outputs[0]
        assert output.error is None and completion.finish_reason in ("stop", "length")
        if completion.finish_reason == "stop":
            stopped += 1
            value = json.loads(completion.text)
            errors = list(jsonschema.Draft202012Validator(schemas[name]).iter_errors(value))
            assert not errors, (name, completion.text, errors)
    return stopped / len(names)


class TestEveryKind:
    """What ends with "stop" is in the grammar."""

    def test_some_schemas(self, engine: Engine) -> None:
        assert require_valid(engine, SUBSET, {"disable_any_whitespace": True}) > 0.7

    @pytest.mark.slow
    @pytest.mark.parametrize("model", ["llama", "qwen3"])
    def test_all_schemas(self, make_engine: MakeEngine, model: str) -> None:
        tokenizer = {} if model == "llama" else {"tokenizer": str(TINY / "llama")}
        engine, names = make_engine(model, **SETTINGS, **tokenizer), list(collection())
        assert require_valid(engine, names, {"disable_any_whitespace": True}) > 0.7
        assert require_valid(engine, names, {}) > 0.5

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("pattern", ["[0-9]{2,5}", "(ab|cd)*e", "[^a]{3}", LIST_OF_DIGITS])
    def test_regexes(self, engine: Engine, pattern: str, temperature: float) -> None:
        params = following(regex=pattern, sampling={"temperature": temperature})
        for output in engine.generate([[i, 7] for i in range(3, 11)], params):
            completion = output.outputs[0]
            assert completion.finish_reason == "length" or re.fullmatch(pattern, completion.text), completion

    def test_choices(self, engine: Engine) -> None:
        choices = ["yes", "no", "yes, but", "größer als 日"]
        outputs = engine.generate([[i, 9] for i in range(3, 40)], following(choice=choices))
        assert {o.outputs[0].text for o in outputs} == set(choices)
        assert {o.outputs[0].finish_reason for o in outputs} == {"stop"}

    def test_lark(self, engine: Engine) -> None:
        grammar = 'start: pair+\npair: "(" pair? ")" | "[" NUMBER "]"\nNUMBER: /[0-9]{1,2}/'
        stopped = 0
        for output in engine.generate([[i, 9] for i in range(3, 30)], following(150, grammar=grammar)):
            completion, text = output.outputs[0], output.outputs[0].text
            if completion.finish_reason == "stop":
                stopped += 1
                text = re.sub(r"\[[0-9]{1,2}\]", "()", text)
                while "()" in text:
                    text = text.replace("()", "")
                assert text == "", completion
        assert stopped > 10

    def test_structural_tags(self, engine: Engine) -> None:
        tag = {"structures": [{"begin": "<a>", "end": "</a>", "schema": PERSON}], "triggers": ["<a"]}
        bias = {engine.get_tokenizer().encode("<")[0]: 4.0, engine.get_tokenizer().encode("a")[0]: 4.0}
        calls = 0
        for output in engine.generate(
            [[i, 9] for i in range(3, 12)], following(structural_tag=tag, sampling={"logit_bias": bias})
        ):
            if output.outputs[0].finish_reason == "stop":
                for call in re.findall("<a(.*?)</a>", output.outputs[0].text, re.DOTALL):
                    calls += 1
                    jsonschema.validate(json.loads(call.removeprefix(">")), PERSON)
            else:
                calls += "<a>{" in output.outputs[0].text
        assert calls > 0

    def test_without_masks_they_are_not_followed(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        """The tests above can fail: a mask of ones lets the model write what it likes, which is noticed."""
        sample = Executor.sample

        def unmasked(executor: Executor, started: StartedStep, mask: np.ndarray | None = None) -> Any:
            return sample(executor, started, None if mask is None else np.full_like(mask, -1))

        monkeypatch.setattr(Executor, "sample", unmasked)
        outputs = engine.generate([[i, 9] for i in range(3, 11)], following(json=PERSON))
        assert {o.outputs[0].finish_reason for o in outputs} == {"error"}
        assert all("doesn't satisfy the grammar" in str(o.error) for o in outputs)


def mixed(engine: Engine, rng: np.random.Generator, count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests of which every other one follows a grammar."""
    prompts = [random_ids(rng, int(rng.integers(1, 60))) for _ in range(count)]
    wishes = [
        following(60, json=PERSON),
        following(60, regex=LIST_OF_DIGITS, sampling={"logprobs": 3}),
        following(60, choice=["one", "two", "three"], sampling={"temperature": 0}),
        following(60, json_object=True, sampling={"repetition_penalty": 1.1}),
    ]
    params = []
    for index in range(count):
        seed = {"seed": int(rng.integers(2**31))}
        params.append(
            wishes[index // 2 % len(wishes)].replace(**seed)
            if index % 2
            else free(temperature=float(index % 4 != 0), **seed)
        )
    return prompts, params


class TestCompany:
    """Neighbours change nothing."""

    def test_rows_without_a_grammar_get_the_tokens_that_they_get_alone(self, engine: Engine) -> None:
        prompts, params = mixed(engine, np.random.default_rng(3), 16)
        together = engine.generate(prompts, params)
        plain = [i for i, p in enumerate(params) if p.structured_outputs is None]
        alone = engine.generate([prompts[i] for i in plain], [params[i] for i in plain])
        assert [tokens_of(together[i]) for i in plain] == [tokens_of(o) for o in alone]

    def test_rows_with_a_grammar_get_the_tokens_that_they_get_alone(self, engine: Engine) -> None:
        prompts, params = mixed(engine, np.random.default_rng(4), 12)
        together = engine.generate(prompts, params)
        for index in range(1, len(prompts), 2):
            assert tokens_of(engine.generate(prompts[index], params[index])[0]) == tokens_of(together[index])

    def test_overlap_changes_nothing(self, make_engine: MakeEngine) -> None:
        prompts, params = mixed(make_engine(**SETTINGS), np.random.default_rng(5), 20)
        ahead = make_engine(**SETTINGS).generate(prompts, params)
        behind = make_engine(**SETTINGS, async_scheduling=False).generate(prompts, params)
        assert [tokens_of(o) for o in ahead] == [tokens_of(o) for o in behind]

    def test_preemption_chunks_and_the_prefix_cache_change_nothing(self, make_engine: MakeEngine) -> None:
        """Few blocks, small chunks: sequences lose their rows in the middle of their grammars."""
        tight = make_engine(num_gpu_blocks_override=22, block_size=8, max_num_batched_tokens=16)
        roomy = make_engine(**SETTINGS)
        prompts, params = mixed(roomy, np.random.default_rng(6), 24)
        prompts[5:9] = [[*prompts[4], *p][:60] for p in prompts[5:9]]
        before = tight.metrics()["num_preemptions"]
        requests = [
            inputs_of(tight).make(p, q.replace(output_kind=RequestOutputKind.FINAL_ONLY))
            for p, q in zip(prompts, params, strict=True)
        ]
        outputs = drive(core_of(tight), [(i, request) for i, request in enumerate(requests)])
        expected = roomy.generate(prompts, params)
        assert [tokens_of(outputs[r.request_id]) for r in requests] == [tokens_of(o) for o in expected]
        assert tight.metrics()["num_preemptions"] - before > 3

    def test_n_completions_each_follow_it(self, engine: Engine) -> None:
        [output] = engine.generate([[5, 6]], following(regex="[a-z]{4}-[0-9]{3}", sampling={"n": 6, "seed": 1}))
        texts = [c.text for c in output.outputs]
        assert all(re.fullmatch("[a-z]{4}-[0-9]{3}", text) for text in texts) and len(set(texts)) == 6

    def test_nothing_compiles(self, engine: Engine) -> None:
        before = engine.metrics()["compiles_after_ready"]
        for logprobs in (None, 3, 20):
            engine.generate([[i, 9] for i in range(3, 8)], following(40, json=PERSON, sampling={"logprobs": logprobs}))
        assert engine.metrics()["compiles_after_ready"] == before

    def test_steps_without_a_grammar_run_no_mask(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("no row follows a grammar")

        engine.generate([5, 6], following(20, regex="[ab]{3}"))
        monkeypatch.setattr(EngineCore, "_make_mask", refuse)
        assert only(engine.generate([5, 6], free())).finish_reason == "length"


class TestOtherParameters:
    """Together with a grammar each parameter does what its documentation says."""

    def test_greedy_takes_the_best_token_that_the_grammar_allows(self, engine: Engine) -> None:
        completion = only(engine.generate([5, 6], following(1, regex="[0-9]{9}", sampling={"temperature": 0})))
        [output] = engine.generate([5, 6], free(max_tokens=1, temperature=0, allowed_token_ids=list(DIGITS)))
        assert completion.token_ids == output.outputs[0].token_ids

    def test_logprobs_are_of_what_the_grammar_allows(self, make_engine: MakeEngine) -> None:
        engine = make_engine(**SETTINGS, max_logprobs=-1)
        for asked in (5, 20, -1):
            completion = only(engine.generate([5, 6], following(regex="[0-9]{6}|x", sampling={"logprobs": asked})))
            assert completion.logprobs is not None and completion.finish_reason == "stop"
            for position, candidates in enumerate(completion.logprobs):
                assert all(np.isfinite(c.logprob) for c in candidates.values())
                ids = {*DIGITS, engine.get_tokenizer().token_id("x")} if position == 0 else set(DIGITS)
                assert set(candidates) <= ids
                if asked != 5:
                    assert set(candidates) == ids
                    assert sum(np.exp(c.logprob) for c in candidates.values()) == pytest.approx(1, abs=1e-4)

    def test_ignore_eos_goes_on_while_the_grammar_can(self, engine: Engine) -> None:
        endless = only(engine.generate([5, 6], following(30, regex="[0-9]+", sampling={"ignore_eos": True})))
        assert endless.finish_reason == "length" and re.fullmatch("[0-9]{30}", endless.text)
        bounded = only(engine.generate([5, 6], following(30, regex="[0-9]{1,7}", sampling={"ignore_eos": True})))
        assert bounded.finish_reason == "stop" and re.fullmatch("[0-9]{7}", bounded.text)

    def test_min_tokens_keeps_the_end_away_while_the_grammar_can(self, engine: Engine) -> None:
        for seed in range(5):
            params = following(30, regex="[0-9]{1,20}", sampling={"min_tokens": 12, "seed": seed})
            assert re.fullmatch("[0-9]{12,20}", only(engine.generate([5, 6], params)).text)
        short = only(engine.generate([5, 6], following(30, regex="[0-9]{3}", sampling={"min_tokens": 12})))
        assert short.finish_reason == "stop" and len(short.text) == 3

    def test_min_tokens_where_only_the_end_is_left(self, engine: Engine) -> None:
        """The grammar could go on, but not with allowed_token_ids: the end is taken although it is early."""
        allowed = [DIGITS[0], EOS]
        params = following(30, regex="0?0?0?0?x*", sampling={"min_tokens": 12, "allowed_token_ids": allowed})
        completion = only(engine.generate([5, 6], params))
        assert completion.finish_reason == "stop" and set(completion.text) <= {"0"}

    def test_stop_strings_and_stop_tokens_end_it_early(self, engine: Engine) -> None:
        params = following(50, regex="[0-9]{5}x[0-9]{5}", sampling={"stop": ["x"]})
        completion = only(engine.generate([5, 6], params))
        assert completion.stop_reason == "x" and re.fullmatch("[0-9]{5}", completion.text)
        stop = engine.get_tokenizer().token_id("x")
        params = following(50, regex="[0-9]{5}x[0-9]{5}", sampling={"stop_token_ids": [stop]})
        completion = only(engine.generate([5, 6], params))
        assert completion.stop_reason == stop and re.fullmatch("[0-9]{5}", completion.text)

    def test_allowed_tokens_bias_and_bad_words_narrow_it(self, engine: Engine) -> None:
        few = {"allowed_token_ids": [DIGITS[1], DIGITS[2]]}
        assert re.fullmatch("[12]{8}", only(engine.generate([5, 6], following(regex="[0-9]{8}", sampling=few))).text)
        words = {"bad_words": [str(d) for d in range(7)]}
        assert re.fullmatch("[789]{8}", only(engine.generate([5, 6], following(regex="[0-9]{8}", sampling=words))).text)
        bias = {"logit_bias": {DIGITS[3]: 100.0, QUOTE: 100.0}}
        assert only(engine.generate([5, 6], following(regex="[0-9]{8}", sampling=bias))).text == "3" * 8

    @pytest.mark.parametrize(
        "sampling", [{"allowed_token_ids": [QUOTE, EOS]}, {"bad_words": [str(d) for d in range(10)]}]
    )
    def test_if_nothing_is_left_that_request_fails_alone(self, engine: Engine, sampling: dict[str, Any]) -> None:
        failed_before, prompts = engine.metrics()["num_failed_steps"], [[5, 6], [7, 8], [9, 10]]
        params = [free(seed=1), following(regex='"[0-9]{3}"', sampling={"n": 2, **sampling}), following(json=PERSON)]
        outputs = engine.generate(prompts, params)
        assert "no token is left that the grammar and the other parameters both allow" in str(outputs[1].error)
        assert {c.finish_reason for c in outputs[1].outputs} == {"error"}
        assert [o.error for o in outputs[::2]] == [None, None]
        assert tokens_of(outputs[0]) == tokens_of(engine.generate([5, 6], params[0])[0])
        assert engine.metrics()["num_failed_steps"] == failed_before

    def test_the_text_of_an_end_token_does_not_end_it(self, engine: Engine) -> None:
        """A grammar may demand `<|im_end|>` as text, which is the end token to the tokenizer."""
        [output] = engine.generate([[5, 6]], following(choice=["<|im_end|>"]))
        assert output.outputs[0].finish_reason == "error" and "no token is left" in str(output.error)

    def test_the_last_token_may_complete_it(self, engine: Engine) -> None:
        completion = only(engine.generate([5, 6], following(3, regex="[0-9]{3}")))
        assert completion.finish_reason == "stop" and len(completion.token_ids) == 3
        assert only(engine.generate([5, 6], following(3, regex="[0-9]{4}"))).finish_reason == "length"
