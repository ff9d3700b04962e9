"""A quantized KV cache through the whole engine: smaller, nearly the same answers, the same whatever the schedule."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from tests.engine.conftest import MakeEngine
from tests.engine.helpers import GOLDEN_SETTINGS, TINY, golden_prompts, parts_of, prompt_logprobs

# Mean difference of a prompt's logprobs that rounding keys and values to 8 bits makes on the tiny model. Seen: 0.031
# (int8, 1/254 of a row's largest number) and 0.166 (fp8, 1/16 of each number); float32: 3e-6.
TOLERANCE = {"int8": 0.05, "fp8": 0.25}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logprobs_stay_close(dtype: str, make_engine: MakeEngine) -> None:
    engine = make_engine("llama", **GOLDEN_SETTINGS, kv_cache_dtype=dtype)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    golden = golden_prompts(TINY / "llama")
    found = [prompt_logprobs(output) for output in engine.generate([g.prompt for g in golden], params)]
    expected = [g.logprobs[: len(f)] for f, g in zip(found, golden, strict=True)]
    mean = float(np.abs(np.concatenate(found) - np.concatenate(expected)).mean())
    assert 1e-3 < mean <= TOLERANCE[dtype], "not quantized at all, or quantized wrongly"


def test_chunks_and_batch_mates_change_nothing(make_engine: MakeEngine) -> None:
    """A token is quantized once, by itself: tokens do not depend on who else runs, nor on how prompts are cut."""
    engine = make_engine("llama", **GOLDEN_SETTINGS, kv_cache_dtype="int8")
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=12)
    prompts = [g.prompt for g in golden_prompts(TINY / "llama")]
    together = [o.outputs[0].token_ids for o in engine.generate(prompts, params)]
    assert together == [engine.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]


def test_blocks_are_smaller(make_engine: MakeEngine) -> None:
    """Per token and head one byte an element and four for the scale, instead of four an element."""
    full, small = (
        parts_of(make_engine("llama", **GOLDEN_SETTINGS, kv_cache_dtype=dtype)) for dtype in ("auto", "int8")
    )
    dim = full.model.head_dim
    assert small.ledger.block * 4 * dim == full.ledger.block * (dim + 4)
    assert (full.describe()["kv_cache_dtype"], small.describe()["kv_cache_dtype"]) == ("float32", "int8")


def test_an_unknown_dtype_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, int8, fp8"):
        make_engine("llama", kv_cache_dtype="int4")
