"""Faults stay with their request, each way in follows grammars, and nobody waits for the grammar of another."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from engine.async_engine import AsyncEngine
from engine.engine import Engine
from engine.errors import InvalidRequestError
from engine.outputs import RequestOutput
from engine.runtime.executor import Executor
from engine.sampling_params import RequestOutputKind, SamplingParams
from engine.structured.compiler import GrammarCompiler
from engine.structured.masks import MaskFiller
from engine.structured.matcher import GrammarMatcher
from tests.engine.conftest import MakeEngine
from tests.engine.helpers import SMALL, TINY, core_of, tokens_of
from tests.structured.helpers import SETTINGS, following, free, only
from tests.structured.schemas import collection

PERSON = collection()["person"]


class TestFaults:
    """Faults stay with their request."""

    def test_bad_grammars_start_nothing(self, engine: Engine) -> None:
        before = engine.metrics()["num_requests"]
        with pytest.raises(InvalidRequestError, match="unclosed group") as caught:
            engine.generate([[5], [6]], [free(), following(regex="(")])
        assert caught.value.parameter == "structured_outputs"
        assert engine.metrics()["num_requests"] == before

    def test_no_tokenizer(self, make_engine: MakeEngine) -> None:
        with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
            make_engine(skip_tokenizer_init=True).generate([5], following(regex="a"))

    def test_a_matcher_that_fails_at_run_time(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        accept = GrammarMatcher.accept

        def fail_late(matcher: GrammarMatcher, tokens: Sequence[int]) -> bool:
            late = matcher.live.is_accepting()  # only the regex below is, in the middle
            return accept(matcher, [0]) if late else accept(matcher, tokens)

        prompts, params = [[5, 6], [7, 8], [9, 10]], [free(seed=3), following(regex="aa[0-9]*"), following(json=PERSON)]
        expected = engine.generate(prompts[0], params[0])[0]
        monkeypatch.setattr(GrammarMatcher, "accept", fail_late)
        params[1] = params[1].replace(ignore_eos=True)
        outputs = engine.generate(prompts, params)
        assert "doesn't satisfy the grammar" in str(outputs[1].error)
        assert outputs[1].outputs[0].finish_reason == "error" and outputs[1].outputs[0].text.startswith("aa")
        assert outputs[2].error is None and tokens_of(outputs[0]) == tokens_of(expected)

    def test_a_filler_that_raises_fails_its_step_only(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("injected")

        with monkeypatch.context() as patch:
            patch.setattr(MaskFiller, "fill", fail)
            [output] = engine.generate([[5, 6]], following(json=PERSON))
            assert "injected" in str(output.error)
        assert only(engine.generate([5, 6], following(choice=["ok"]))).text == "ok"

    def test_a_step_that_fails_while_a_masked_one_waits(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        """The step in flight is read between the forward pass and the sampling of the next one, which is then void."""
        core, collect, calls = core_of(engine), Executor.collect, []

        def fail_third(executor: Executor, step: Any) -> Any:
            calls.append(step)
            if len(calls) == 3:
                raise RuntimeError("injected")
            return collect(executor, step)

        with monkeypatch.context() as patch:
            patch.setattr(Executor, "collect", fail_third)
            [output] = engine.generate([[5, 6]], following(regex="[0-9]{9}"))
        assert "injected" in str(output.error)
        core.scheduler.check_invariants()
        assert re.fullmatch("[0-9]{9}", only(engine.generate([5, 6], following(regex="[0-9]{9}"))).text)


class TestWaysIn:
    """Each way to ask."""

    def test_stream_and_chat(self, engine: Engine) -> None:
        pieces = [o.outputs[0].text for o in engine.stream([5, 6], following(json=PERSON))]
        assert len(pieces) > 5
        jsonschema.validate(json.loads("".join(pieces)), PERSON)
        messages = [{"role": "user", "content": "who?"}]
        assert only(engine.chat(messages, following(choice=["me", "you"]))).text in ("me", "you")

    def test_async(self, shelf: Any) -> None:
        async def ask(engine: AsyncEngine, params: SamplingParams, request_id: str) -> list[RequestOutput]:
            return [o async for o in engine.generate([5, 6], params, request_id=request_id)]

        async def main() -> None:
            async with AsyncEngine(
                str(TINY / "llama"), **{**SMALL, **SETTINGS, "compilation_cache_dir": shelf.cache_dir}
            ) as engine:
                params = [following(json=PERSON), following(regex="[0-9]{5}"), free()]
                cumulative = [p.replace(output_kind=RequestOutputKind.FINAL_ONLY, seed=1) for p in params]
                answers = await asyncio.gather(*(ask(engine, p, f"r{i}") for i, p in enumerate(cumulative)))
                jsonschema.validate(json.loads(answers[0][-1].outputs[0].text), PERSON)
                assert re.fullmatch("[0-9]{5}", answers[1][-1].outputs[0].text)
                with pytest.raises(InvalidRequestError, match="unclosed"):
                    await ask(engine, following(regex="("), "bad")
                await self.while_a_grammar_compiles(engine, ask)

        asyncio.run(main())

    async def while_a_grammar_compiles(self, engine: AsyncEngine, ask: Any) -> None:
        """Others are served; the one that waits can be aborted by its id, or cancelled."""
        grammars, held = engine._built.core.grammars, Future[LLMatcher]()
        assert isinstance(grammars, GrammarCompiler)
        slow, real = following(regex="[ab]{7}"), grammars.submit
        known = real(slow.structured_outputs).result()  # type: ignore[arg-type]
        grammars.submit = lambda params: held if params == slow.structured_outputs else real(params)  # type: ignore[method-assign]
        try:
            waiting, aborted, cancelled = (asyncio.create_task(ask(engine, slow, f"slow{i}")) for i in range(3))
            answer = await asyncio.wait_for(ask(engine, free(), "quick"), 30)
            assert answer[-1].finished and not waiting.done()
            engine.abort("slow1")
            cancelled.cancel()
            await asyncio.sleep(0.01)
            assert cancelled.cancelled() and not held.cancelled() and not aborted.done()
            held.set_result(known)
            last = (await asyncio.wait_for(aborted, 30))[-1]
            assert last.finished and last.outputs[0].finish_reason == "abort"
            text = (await asyncio.wait_for(waiting, 30))[-1].outputs[0].text
            assert re.fullmatch("[ab]{7}", text)
            with pytest.raises(InvalidRequestError, match="in use"):
                await asyncio.gather(*(ask(engine, following(regex="[ab]{9}"), "same") for _ in range(2)))
            async with asyncio.timeout(30):  # the one of the two that was first is still being compiled
                while engine._driver._compiling:
                    await asyncio.sleep(0.01)
        finally:
            del grammars.submit  # type: ignore[method-assign]
