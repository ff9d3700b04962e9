"""Pooled requests: the same vectors as one forward pass over the whole prompt gives, whatever else the engine does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.async_engine import AsyncEngine
from engine.engine import Engine
from engine.errors import ContextLengthError, InvalidRequestError, RequestFailedError
from engine.outputs import EmbeddingOutput
from engine.pooling import PoolingParams
from engine.runtime.pooling import POOL_ROWS, pool_rows
from engine.sampling_params import RequestOutputKind, SamplingParams
from models.inputs import ForwardInputs
from pallas_kernels.ragged import RaggedBatch
from tests.engine.conftest import MakeEngine
from tests.engine.helpers import SMALL, TINY, core_of, drive, inputs_of, parts_of, random_ids, tokens_of

LONGEST = 128  # max_model_len of the small engines
TOLERANCE = 2e-5  # float32, sums in another order


@cache
def _prompts() -> tuple[list[int], ...]:
    rng = np.random.default_rng(11)
    return tuple(random_ids(rng, length) for length in (1, 2, 15, 16, 17, 40, 90, LONGEST - 1, LONGEST))


@cache
def _reference(engine: Engine) -> Callable[[list[int]], np.ndarray]:
    """float32[T, E] of a prompt: one forward pass in a cache of its own, with no packing, chunks or scheduler."""
    core = core_of(engine)
    num_pages = -(-LONGEST // core.executor.program.limits.block_size) + 1
    program = core.executor.program.with_pages(num_pages)
    run = jax.jit(lambda params, inputs, pages: program.model.bind(params)(inputs, pages)[0])

    def hidden_states(prompt: list[int]) -> np.ndarray:
        length, pad = len(prompt), LONGEST - len(prompt)
        batch = RaggedBatch(
            jnp.array([0, length], jnp.int32),
            jnp.array([length], jnp.int32),
            jnp.arange(1, num_pages, dtype=jnp.int32)[None],
            jnp.int32(1),
        )
        positions = jnp.array([*range(length), *[0] * pad], jnp.int32)
        inputs = ForwardInputs(
            jnp.array(prompt + [0] * pad, jnp.int32), positions, jnp.array([length - 1], jnp.int32), batch
        )
        return np.asarray(run(core.executor._params, inputs, program.make_state()[0].cache), np.float32)[:length]

    return hidden_states


def expected(engine: Engine, prompt: list[int], pooling: str, normalize: bool) -> np.ndarray:
    """float64[E], from the reference."""
    hidden = _reference(engine)(prompt).astype(np.float64)
    vector = hidden[-1] if pooling == "last" else hidden.mean(0)
    return vector / np.linalg.norm(vector) if normalize else vector


def assert_right(engine: Engine, prompt: list[int], output: EmbeddingOutput, pooling: str, normalize: bool) -> None:
    right = expected(engine, prompt, pooling, normalize)
    np.testing.assert_allclose(output.embedding, right, atol=TOLERANCE * np.abs(right).max() * 4, rtol=1e-4)
    assert output.num_prompt_tokens == len(prompt)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3", "smollm3"))])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_those_of_one_forward_pass(make_engine: MakeEngine, name: str, pooling: str) -> None:
    engine = make_engine(name, max_num_batched_tokens=16, skip_tokenizer_init=True)
    prompts = [prompt for prompt in _prompts() if len(prompt) in (1, 17, 40)]
    outputs = engine.embed(prompts, pooling=pooling)  # type: ignore[arg-type]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_right(engine, prompt, output, pooling, True)
        assert abs(np.linalg.norm(output.embedding) - 1) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 16}, {"async_scheduling": False}])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_any_length_and_any_chunks(make_engine: MakeEngine, settings: dict, pooling: str) -> None:
    """Up to prompts of max_model_len, which leave no room for a token."""
    engine = make_engine(**settings)
    outputs = engine.embed(list(_prompts()), pooling=pooling, normalize=False)  # type: ignore[arg-type]
    for prompt, output in zip(_prompts(), outputs, strict=True):
        assert_right(engine, prompt, output, pooling, False)


def test_a_cached_prefix_has_no_hidden_states(make_engine: MakeEngine) -> None:
    """ "last" reads the cache, "mean" computes every token; both are right."""
    engine = make_engine()
    prompt = _prompts()[6]
    engine.reset_prefix_cache()
    engine.generate(prompt, SamplingParams(max_tokens=2, temperature=0))
    for pooling in ("last", "mean"):
        [output] = engine.embed(prompt, pooling=pooling)  # type: ignore[arg-type]
        assert_right(engine, prompt, output, pooling, True)
        assert (output.num_cached_tokens > 0) == (pooling == "last")


def test_generation_finds_the_blocks_of_a_pooled_prompt(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = _prompts()[6]
    engine.reset_prefix_cache()
    engine.embed(prompt, pooling="mean")
    [output] = engine.generate(prompt, SamplingParams(max_tokens=2, temperature=0))
    assert output.num_cached_tokens >= 80


@pytest.mark.parametrize("blocks", [pytest.param(256, marks=pytest.mark.slow), 18])
def test_beside_generating_requests(make_engine: MakeEngine, blocks: int) -> None:
    """Neither changes the other, also where sequences lose their blocks (18 blocks: room for one long sequence)."""
    engine = make_engine(num_gpu_blocks_override=blocks, block_size=8)
    core, make = core_of(engine), inputs_of(engine)
    engine.reset_prefix_cache()
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=5, output_kind=RequestOutputKind.FINAL_ONLY)
    prompts = [p for p in _prompts() if len(p) < 100]
    alone = {}
    for index, prompt in enumerate(prompts):
        name = f"gen-{blocks}-{index}"
        alone |= drive(core, [(0, make.make(prompt, params, request_id=name))])
    engine.reset_prefix_cache()
    before = core.scheduler.stats().num_preemptions
    arrivals = []
    for index, prompt in enumerate(prompts):
        pooling = PoolingParams("mean" if index % 2 else "last", normalize=False)
        arrivals.append((2 * (index // 3), make.make(prompt, params, request_id=f"gen-{blocks}-{index}")))
        arrivals.append((2 * (index // 3), make.make_pooled(prompt, pooling, request_id=f"pool-{index}")))
    outputs = drive(core, arrivals)
    for index, prompt in enumerate(prompts):
        name = f"gen-{blocks}-{index}"
        assert tokens_of(outputs[name]) == tokens_of(alone[name])
        pooled = outputs[f"pool-{index}"]
        assert [c.finish_reason for c in pooled.outputs] == ["stop"] and pooled.outputs[0].token_ids == ()
        assert_right(engine, prompt, EmbeddingOutput.of(pooled), "mean" if index % 2 else "last", False)
    preempted = core.scheduler.stats().num_preemptions - before
    assert (preempted > 0) == (blocks == 18)


def test_a_pooled_prompt_that_loses_its_blocks_begins_anew(make_engine: MakeEngine) -> None:
    """Its mean must not count the chunks twice that it computed before."""
    engine = make_engine(max_num_batched_tokens=16)
    core, make = core_of(engine), inputs_of(engine)
    prompt = _prompts()[6]
    core.add(make.make_pooled(prompt, PoolingParams("mean", normalize=False), request_id="pooled"))
    for _ in range(3):
        core.step()
    [sequence] = list(core.scheduler._running)
    assert 0 < sequence.num_computed < len(prompt)
    core.scheduler._preempt(sequence)
    output = drive(core, [])["pooled"]
    assert output.metrics is not None and output.metrics.num_preemptions == 1
    assert_right(engine, prompt, EmbeddingOutput.of(output), "mean", False)


def test_an_aborted_request_has_no_embedding(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=16)
    core = core_of(engine)
    core.add(inputs_of(engine).make_pooled(_prompts()[6], PoolingParams("mean"), request_id="pooled"))
    core.step()
    core.step()
    assert core.abort("pooled")
    output = drive(core, [])["pooled"]
    assert [c.finish_reason for c in output.outputs] == ["abort"] and output.embedding is None
    with pytest.raises(RequestFailedError, match="aborted"):
        EmbeddingOutput.of(output)


def test_a_failed_step_fails_the_embedding(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(core_of(engine).executor, "collect", fail)
        with pytest.raises(RequestFailedError, match="injected"):
            engine.embed("hello")
    assert len(engine.embed("hello")[0].embedding) == parts_of(engine).model.hidden_size


def test_async_embeddings(make_engine: MakeEngine, compilation_cache: str) -> None:
    """The same as `Engine.embed`, beside streams; abort and cancellation end a request, and its id is free again."""
    settings = {**SMALL, "max_num_batched_tokens": 16, "compilation_cache_dir": compilation_cache}
    prompt, wanted = _prompts()[6], make_engine(max_num_batched_tokens=16).embed(_prompts()[6], pooling="mean")[0]

    async def text(client: AsyncEngine) -> int:
        params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        return [output async for output in client.generate(prompt, params)][-1].num_cached_tokens

    async def use() -> None:
        async with AsyncEngine(str(TINY / "llama"), **settings) as client:
            _, embedding, _ = await asyncio.gather(
                text(client), client.embed(prompt, pooling="mean", request_id="one"), text(client)
            )
            np.testing.assert_allclose(embedding.embedding, wanted.embedding, atol=1e-6)
            assert embedding.request_id == "one"
            with pytest.raises(InvalidRequestError, match="pooling must be one of"):
                await client.embed(prompt, pooling="cls")  # type: ignore[arg-type]
            aborted = asyncio.create_task(client.embed(prompt, pooling="mean", request_id="two"))
            await asyncio.sleep(0)
            client.abort("two")
            with pytest.raises(RequestFailedError, match="aborted"):
                await aborted
            cancelled = asyncio.create_task(client.embed(prompt, pooling="mean", request_id="three"))
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            await client.embed([5, 6])  # behind the abort
            again = await client.embed(prompt, pooling="mean", request_id="three")
            np.testing.assert_allclose(again.embedding, wanted.embedding, atol=1e-6)
            assert client.metrics()["num_running"] == 0

    asyncio.run(asyncio.wait_for(use(), 120))


def test_bad_input_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="pooling must be one of last, mean; got 'cls'"):
        engine.embed("hello", pooling="cls")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="normalize must be true or false"):
        engine.embed("hello", normalize=1)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="must not be empty"):
        engine.embed([[]])
    with pytest.raises(ContextLengthError, match=f"maximum context length is {LONGEST} tokens"):
        engine.embed([[5] * (LONGEST + 1)])
    with pytest.raises(InvalidRequestError, match="not in the vocabulary"):
        engine.embed([[5, 10_000]])


def test_pooling_compiles_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=4)
    before = engine.metrics()["compiles_after_ready"]
    for pooling in ("last", "mean"):
        engine.embed([p for p in _prompts() if len(p) < 64] * 3, pooling=pooling)  # type: ignore[arg-type]
    engine.embed([[5], [6], [7]])  # decode buckets
    assert engine.metrics()["compiles_after_ready"] == before


def test_what_others_computed_does_not_reach_a_sum() -> None:
    """Not even if it is infinite: rows are selected, not multiplied by zero."""
    hidden = np.full((16, 8), np.inf, np.float32)
    hidden[3:7] = np.arange(8)
    ranges = np.zeros((POOL_ROWS, 2), np.int32)
    ranges[2] = (3, 7)
    sums = np.asarray(pool_rows(hidden, ranges))
    assert sums[2].tolist() == (4 * np.arange(8)).tolist()
    assert (sums[[0, 1, *range(3, POOL_ROWS)]] == 0).all()
