"""What a user may ask of `Engine` and what comes back: prompts, lengths, stops, samples, streams, order, cache."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.engine import Engine
from engine.errors import EngineDeadError
from engine.outputs import RequestOutput
from engine.sampling_params import RequestOutputKind, SamplingParams
from tests.engine.conftest import MakeEngine
from tests.engine.helpers import (
    GOLDEN_SETTINGS,
    SMALL,
    TINY,
    VOCAB,
    core_of,
    golden_prompts,
    inputs_of,
    random_ids,
    tokens_of,
)

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
EOS = 2
LETTERS = list(range(67, 93))  # tokens that are one ASCII letter each
TEXT = "the quick brown fox"


def ids_of(output: RequestOutput, index: int = 0) -> tuple[int, ...]:
    return output.outputs[index].token_ids


def stream_kind(engine: Engine, prompt: Any, params: SamplingParams, kind: RequestOutputKind) -> list[RequestOutput]:
    """All outputs of one request of an output kind."""
    core, outputs = core_of(engine), []
    core.add(inputs_of(engine).make(prompt, params.replace(output_kind=kind)))
    while core.has_work:
        outputs += core.step()
    return outputs


class TestPrompts:
    """Text, ids, mappings, lists of any of them."""

    def test_every_spelling_of_a_prompt_is_the_same_prompt(self, engine: Engine) -> None:
        ids = engine.get_tokenizer().encode(TEXT)
        spellings = [TEXT, ids, tuple(ids), np.array(ids), {"prompt": TEXT}, {"prompt_token_ids": ids}, {"prompt": ids}]
        together = engine.generate(spellings, GREEDY)
        alone = [engine.generate(spelling, GREEDY)[0] for spelling in spellings]
        assert {tuple(o.prompt_token_ids) for o in [*together, *alone]} == {tuple(ids)}
        assert len({ids_of(o) for o in [*together, *alone]}) == 1
        assert [o.prompt for o in together] == [TEXT, None, None, None, TEXT, None, None]

    def test_outputs_come_in_the_order_of_the_prompts(self, engine: Engine) -> None:
        golden = golden_prompts(TINY / "llama")
        prompts = [g.prompt for g in golden] * 3  # more than run at a time, of different lengths
        outputs = engine.generate(prompts, GREEDY, use_tqdm=True)
        assert [list(o.prompt_token_ids) for o in outputs] == prompts
        assert [list(ids_of(o)) for o in outputs] == [g.continuation[:8] for g in golden] * 3
        assert len({o.request_id for o in outputs}) == len(prompts)

    def test_parameters_per_prompt(self, engine: Engine) -> None:
        params = [GREEDY.replace(max_tokens=n) for n in (1, 5, 3)]
        outputs = engine.generate([[5], [6], [7]], params)
        assert [len(ids_of(o)) for o in outputs] == [1, 5, 3]

    def test_defaults_are_vllms(self, engine: Engine) -> None:
        output = engine.generate([5, 6])[0]
        assert 1 <= len(ids_of(output)) <= 16 and output.finished and output.error is None
        assert output.outputs[0].logprobs is None and output.prompt_logprobs is None

    def test_chat(self, engine: Engine) -> None:
        messages = [{"role": "user", "content": "hi"}]
        text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        expected = engine.get_tokenizer().encode(text, add_special_tokens=False)
        assert engine.apply_chat_template(messages) == expected
        one = engine.chat(messages, GREEDY)
        two = engine.chat([messages, [*messages, {"role": "assistant", "content": "ho"}]], GREEDY)
        assert list(one[0].prompt_token_ids) == expected
        assert len(two) == 2 and ids_of(two[0]) == ids_of(one[0])
        assert len(two[1].prompt_token_ids) > len(expected)
        bare = engine.chat(messages, GREEDY, add_generation_prompt=False)[0]
        assert len(bare.prompt_token_ids) < len(expected)
        started = [*messages, {"role": "assistant", "content": "ho"}]
        going_on = engine.chat(started, GREEDY, add_generation_prompt=False, continue_final_message=True)[0]
        assert engine.get_tokenizer().decode(going_on.prompt_token_ids).endswith("ho")

    def test_without_a_tokenizer(self, make_engine: MakeEngine) -> None:
        engine, golden = make_engine(skip_tokenizer_init=True), golden_prompts(TINY / "llama")[2]
        output = engine.generate(golden.prompt, GREEDY.replace(logprobs=2))[0]
        assert list(ids_of(output)) == golden.continuation[:8]
        assert output.outputs[0].text == "" and engine.get_tokenizer() is None
        assert {p.decoded_token for position in output.outputs[0].logprobs or [] for p in position.values()} == {None}


class TestEnds:
    """How a completion ends."""

    def test_max_tokens_is_capped_to_the_context(self, engine: Engine) -> None:
        limit = engine.describe()["max_model_len"]
        prompt = random_ids(np.random.default_rng(0), limit - 6)
        for asked in (100, None):
            output = engine.generate(prompt, GREEDY.replace(max_tokens=asked))[0]
            assert len(ids_of(output)) == 6 and output.outputs[0].finish_reason == "length"
        longest = engine.generate(random_ids(np.random.default_rng(1), limit - 1), GREEDY)[0]
        assert len(ids_of(longest)) == 1

    def test_end_of_sequence(self, engine: Engine) -> None:
        wanted = GREEDY.replace(logit_bias={EOS: 100}, ignore_eos=False)
        output = engine.generate([5], wanted)[0].outputs[0]
        assert (output.token_ids, output.finish_reason, output.stop_reason) == ((EOS,), "stop", None)
        assert output.text == ""
        ignored = engine.generate([5], wanted.replace(ignore_eos=True))[0].outputs[0]
        assert (ignored.token_ids, ignored.finish_reason) == ((EOS,) * 8, "length")
        late = engine.generate([5], wanted.replace(min_tokens=3))[0].outputs[0]
        assert len(late.token_ids) == 4 and late.token_ids.index(EOS) == 3

    @pytest.mark.parametrize("eos", [2, 0])
    def test_a_model_with_several_ends(self, eos: int, make_engine: MakeEngine) -> None:
        engine = make_engine("llama3_rope", **GOLDEN_SETTINGS)
        params = SamplingParams(temperature=0, logit_bias={eos: 100}, min_tokens=2)
        output = engine.generate([5], params)[0].outputs[0]
        assert output.token_ids[-1] == eos and len(output.token_ids) == 3 and output.finish_reason == "stop"
        assert not {0, 2} & set(output.token_ids[:-1])

    def test_stop_token_ids(self, engine: Engine) -> None:
        expected = ids_of(engine.generate(TEXT, GREEDY)[0])
        params = GREEDY.replace(stop_token_ids=[expected[4], 319])
        output = engine.generate(TEXT, params)[0].outputs[0]
        assert output.token_ids == expected[: expected.index(expected[4]) + 1]
        assert (output.finish_reason, output.stop_reason) == ("stop", expected[4])
        shown = engine.generate(TEXT, params.replace(include_stop_str_in_output=True))[0].outputs[0]
        decode = engine.get_tokenizer().decode
        assert output.text == decode(output.token_ids[:-1]) and shown.text == decode(output.token_ids)

    def test_stop_strings_across_tokens(self, engine: Engine) -> None:
        params = GREEDY.replace(allowed_token_ids=LETTERS, max_tokens=20)
        whole = engine.generate(TEXT, params)[0].outputs[0].text
        assert len(whole) == 20
        stop = whole[7:11]  # four tokens
        assert whole.index(stop) == 7
        for stops in (stop, [stop], ["never there", stop]):
            output = engine.generate(TEXT, params.replace(stop=stops))[0].outputs[0]
            assert (output.text, output.finish_reason, output.stop_reason) == (whole[:7], "stop", stop)
            assert len(output.token_ids) == 11
        shown = engine.generate(TEXT, params.replace(stop=stop, include_stop_str_in_output=True))[0].outputs[0]
        assert shown.text == whole[:11]
        last = engine.generate(TEXT, params.replace(stop=stop, max_tokens=11))[0].outputs[0]
        assert (last.text, last.finish_reason, last.stop_reason) == (whole[:7], "stop", stop)
        cut = engine.generate(TEXT, params.replace(stop=stop, max_tokens=9))[0].outputs[0]
        assert (cut.text, cut.finish_reason) == (whole[:9], "length")  # what was held back comes out at the end
        late = engine.generate(TEXT, params.replace(stop=stop, min_tokens=12))[0].outputs[0]
        assert len(late.token_ids) == 20

    def test_detokenize_off(self, engine: Engine) -> None:
        output = engine.generate(TEXT, GREEDY.replace(detokenize=False))[0].outputs[0]
        assert output.text == "" and output.token_ids == ids_of(engine.generate(TEXT, GREEDY)[0])


class TestSamples:
    """Seeds and n."""

    def test_seeds_reproduce(self, engine: Engine) -> None:
        params = [SamplingParams(seed=s, max_tokens=12, ignore_eos=True) for s in (1, 2, 1)]
        first = [ids_of(o) for o in engine.generate([TEXT] * 3, params)]
        again = [ids_of(o) for o in engine.generate([TEXT] * 3, params)]
        assert first == again and first[0] == first[2] != first[1]

    def test_without_a_seed_samples_differ(self, engine: Engine) -> None:
        outputs = engine.generate([TEXT] * 3, SamplingParams(max_tokens=12, ignore_eos=True))
        assert len({ids_of(o) for o in outputs}) == 3

    def test_n_completions(self, make_engine: MakeEngine) -> None:
        prompt = random_ids(np.random.default_rng(3), 40)
        params = SamplingParams(n=4, seed=11, max_tokens=12, ignore_eos=True, logprobs=1)
        for caching in (True, False):  # the sequences of one request share their prompt's blocks in any case
            engine = make_engine(enable_prefix_caching=caching)
            engine.reset_prefix_cache()
            before = engine.metrics()["num_prefix_hit_tokens"]
            output = engine.generate(prompt, params)[0]
            assert engine.metrics()["num_prefix_hit_tokens"] - before == 3 * 32
            assert [c.index for c in output.outputs] == [0, 1, 2, 3] and output.num_cached_tokens == 0
            assert len({c.token_ids for c in output.outputs}) == 4
            assert tokens_of(engine.generate(prompt, params)[0]) == tokens_of(output)
            one = engine.generate(prompt, params.replace(n=1))[0]
            assert ids_of(one) == ids_of(output), "the first of n is the one of n=1"

    def test_more_completions_than_rows(self, engine: Engine) -> None:
        output = engine.generate(TEXT, SamplingParams(n=12, seed=0, max_tokens=5, ignore_eos=True))[0]
        assert len({c.token_ids for c in output.outputs}) == 12

    def test_constraints_hold_together(self, engine: Engine) -> None:
        params = SamplingParams(
            seed=3, max_tokens=40, allowed_token_ids=LETTERS, logit_bias={67: -100.0}, bad_words=["b", "cd"]
        )
        text = engine.generate(TEXT, params)[0].outputs[0].text
        assert len(text) == 40 and set(text) <= set("cdefghijklmnopqrstuvwxyz") and "cd" not in text


class TestStreams:
    """Outputs while a request runs."""

    @pytest.mark.parametrize("stop", [None, "zq", "x"])
    def test_deltas_add_up(self, stop: str | None, engine: Engine) -> None:
        params = SamplingParams(seed=4, max_tokens=30, logprobs=1, stop=stop, ignore_eos=True)
        if stop is not None:
            params = params.replace(allowed_token_ids=LETTERS)
        final = engine.generate(TEXT, params)[0].outputs[0]
        deltas = [o.outputs[0] for o in engine.stream(TEXT, params)]
        assert len(deltas) > 3 and [d.finished for d in deltas] == [False] * (len(deltas) - 1) + [True]
        assert "".join(d.text for d in deltas) == final.text
        assert tuple(t for d in deltas for t in d.token_ids) == final.token_ids
        assert [p for d in deltas for p in d.logprobs or []] == final.logprobs
        assert deltas[-1].finish_reason == final.finish_reason and deltas[-1].stop_reason == final.stop_reason

    def test_output_kinds(self, engine: Engine) -> None:
        params = GREEDY.replace(max_tokens=12)
        final = engine.generate(TEXT, params)[0].outputs[0]
        cumulative = [o.outputs[0] for o in stream_kind(engine, TEXT, params, RequestOutputKind.CUMULATIVE)]
        assert [len(c.token_ids) for c in cumulative] == list(range(1, 13))
        assert all(final.text.startswith(c.text) for c in cumulative) and cumulative[-1] == final
        only = stream_kind(engine, TEXT, params, RequestOutputKind.FINAL_ONLY)
        assert len(only) == 1 and only[0].outputs[0] == final

    def test_no_half_characters(self, engine: Engine) -> None:
        """A model of bytes forced to write two-byte characters: none is shown before it is whole."""
        tokenizer = engine.get_tokenizer()
        lead, tail = (tokenizer.backend.token_to_id(t) for t in ("Ã", "©"))  # bytes C3 A9, an e with acute
        params = SamplingParams(seed=0, max_tokens=30, allowed_token_ids=[lead, tail], ignore_eos=True)
        deltas = [o.outputs[0] for o in engine.stream(TEXT, params)]
        text = "".join(d.text for d in deltas)
        ids = [t for d in deltas for t in d.token_ids]
        assert text == tokenizer.decode(ids) and "é" in text
        for count in range(1, len(deltas)):
            seen = [t for d in deltas[:count] for t in d.token_ids]
            shown = "".join(d.text for d in deltas[:count])
            assert shown == tokenizer.decode(seen[:-1] if seen[-1] == lead else seen)

    def test_two_streams_at_once(self, engine: Engine) -> None:
        params = GREEDY.replace(max_tokens=10)
        prompts = ["one", "two"]
        expected = [o.outputs[0].text for o in engine.generate(prompts, params)]
        streams, texts = [engine.stream(p, params) for p in prompts], ["", ""]
        for pair in zip(*streams, strict=True):
            texts = [text + output.outputs[0].text for text, output in zip(texts, pair, strict=True)]
        assert texts == expected

    def test_leaving_a_stream_aborts(self, engine: Engine) -> None:
        aborted = engine.metrics()["finished"].get("abort", 0)
        for output in engine.stream(TEXT, GREEDY.replace(max_tokens=100)):
            assert not output.finished
            break
        engine.generate([5], GREEDY)
        assert engine.metrics()["num_running"] == 0
        assert engine.metrics()["finished"]["abort"] == aborted + 1

    def test_abort_by_id(self, engine: Engine) -> None:
        params = GREEDY.replace(max_tokens=100, allowed_token_ids=LETTERS, stop="#######")
        whole = engine.generate(TEXT, params)[0].outputs[0].text
        stream, text, tokens = engine.stream(TEXT, params), "", 0
        for output in stream:
            text, tokens = text + output.outputs[0].text, tokens + len(output.outputs[0].token_ids)
            if tokens == 5 and not output.finished:
                assert engine.abort(output.request_id)
        assert output.outputs[0].finish_reason == "abort" and output.error is None
        assert text == whole[:tokens], "what was held back for the stop string comes out"
        assert not engine.abort(output.request_id) and not engine.abort("nobody")


class TestEngineState:
    """Order, cache, counters, lifetime."""

    def test_priorities(self, make_engine: MakeEngine) -> None:
        engine = make_engine(scheduling_policy="priority")
        priority = [3, 9, 1, 7, 0, 5, 8, 2, 6, 4, -1, 11]
        outputs = engine.generate([[5 + p] for p in priority], GREEDY, priority=priority)
        started = sorted(
            (o.metrics.scheduled_ts or 0.0, p) for o, p in zip(outputs, priority, strict=True) if o.metrics
        )
        assert [p for _, p in started] == sorted(priority)
        assert len({ts for ts, _ in started}) >= 3, "they did not all start at once"

    def test_cached_tokens_are_reported(self, engine: Engine) -> None:
        engine.reset_prefix_cache()
        prompt = random_ids(np.random.default_rng(8), 50)

        def cached(ids: list[int], params: SamplingParams = GREEDY, salt: str | None = None) -> int:
            spelled = {"prompt_token_ids": ids} | ({} if salt is None else {"cache_salt": salt})
            return engine.generate(spelled, params)[0].num_cached_tokens

        assert cached(prompt) == 0
        assert cached(prompt) == 48
        assert cached([*prompt[:20], *prompt]) == 16
        assert cached(prompt, salt="another tenant") == 0
        assert cached(prompt, salt="another tenant") == 48
        assert cached(prompt, GREEDY.replace(skip_reading_prefix_cache=True)) == 0
        assert cached(prompt, GREEDY.replace(prompt_logprobs=0)) == 0
        assert cached(prompt[:48]) == 32, "one token must be computed to have something to sample from"
        engine.reset_prefix_cache()
        assert cached(prompt) == 0

    def test_no_prefix_caching(self, make_engine: MakeEngine) -> None:
        engine = make_engine(enable_prefix_caching=False)
        prompt = random_ids(np.random.default_rng(8), 50)
        outputs = [engine.generate(prompt, GREEDY)[0] for _ in range(2)]
        assert [o.num_cached_tokens for o in outputs] == [0, 0] and ids_of(outputs[0]) == ids_of(outputs[1])

    def test_metrics(self, engine: Engine) -> None:
        before = engine.metrics()
        outputs = engine.generate([TEXT, [5, 6, 7]], GREEDY.replace(max_tokens=6))
        after = engine.metrics()
        prompt_tokens = sum(len(o.prompt_token_ids) for o in outputs)
        for name, count in {"num_requests": 2, "prompt_tokens": prompt_tokens, "generation_tokens": 12}.items():
            assert after[name] - before[name] == count, name
        # The last token of each is never computed.
        computed = prompt_tokens + 10 - sum(o.num_cached_tokens for o in outputs)
        assert after["num_tokens"] - before["num_tokens"] == computed
        assert after["finished"]["length"] - before["finished"].get("length", 0) == 2
        assert after["num_running"] == after["num_waiting"] == after["num_queued_reqs"] == 0
        assert after["kv_cache_usage"] == 0.0 and after["num_failed_steps"] == before["num_failed_steps"]
        for output in outputs:
            metrics = output.metrics
            assert metrics is not None and metrics.num_generation_tokens == 6
            times = [metrics.arrival_time, metrics.queued_ts, metrics.scheduled_ts]
            times += [metrics.first_token_ts, metrics.last_token_ts]
            known = [t for t in times if t is not None]
            assert len(known) == 5 and known == sorted(known) and known[0] < known[-1]
            assert metrics.first_token_latency == known[3] - known[0]

    def test_description(self, engine: Engine) -> None:
        described = engine.describe()
        assert described["model_family"] == "llama" and described["vocab_size"] == VOCAB
        assert described["dtype"] == "float32" and described["num_kv_blocks"] == 255
        assert described["kv_cache_tokens"] == 255 * 16 and "KV (256 blocks)" in described["memory"]
        assert set(described["implementations"]) == {"paged_attention", "kv_write", "matmul", "rowwise"}

    def test_after_shutdown(self, compilation_cache: str) -> None:
        with Engine(str(TINY / "llama"), compilation_cache_dir=compilation_cache, **SMALL) as engine:
            assert len(ids_of(engine.generate([5, 6, 7], GREEDY)[0])) == 8
            stream = engine.stream([5], GREEDY)
            next(stream)
        for call in (lambda: engine.generate([5]), lambda: next(stream), engine.metrics, lambda: engine.abort("req-0")):
            with pytest.raises(EngineDeadError, match="shut down"):
                call()


def test_shutdown_lets_go_of_the_executables(compilation_cache: str) -> None:
    """On Linux an executable is memory mappings, and a process may have only so many."""

    def mappings() -> int:
        gc.collect()
        return len(Path("/proc/self/maps").read_text().splitlines())

    settings = {**SMALL, "compilation_cache_dir": compilation_cache}
    with Engine(str(TINY / "llama"), **settings):
        pass  # what the process needs whichever engine comes first
    before = mappings()
    engine = Engine(str(TINY / "llama"), **settings)
    held = mappings() - before
    engine.shutdown()
    left = mappings() - before
    assert held > 200 and left < held / 10, (held, left)
