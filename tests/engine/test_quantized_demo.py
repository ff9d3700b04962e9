"""Quantized SmolLM2 on a text: how much worse it predicts it than in float32."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from engine.engine import Engine
from engine.sampling_params import SamplingParams
from tests.engine.helpers import prompt_logprobs

pytestmark = pytest.mark.slow

TEXT = """\
The old lighthouse stands at the end of a narrow road, two miles from the nearest village. For more than a hundred
years its lamp was lit by hand every evening, and the keeper wrote down the weather in a thick book before he went
to sleep. When the first electric motor was installed, the family that had lived there for three generations moved
to the town, where the children went to school and the father found work in the harbour. Today the tower belongs to
a small group of volunteers. They paint the walls in spring, repair the windows after the autumn storms, and open
the door to visitors on Sunday afternoons. From the gallery you can see the coast on both sides, the fishing boats
that return with the tide, and, when the air is clear, the outline of an island far to the north. A guide explains
how the lens works: a ring of glass prisms bends the light of a small lamp into a single strong beam, so that ships
can see it from twenty miles away. Most people are surprised that the lamp itself is no larger than a bottle of
milk. After the tour there is tea and cake in the kitchen, and anyone who wants to can read the weather book, which
still lies open on the table beside the window.""".replace("\n", " ")

# Largest perplexity over that in float32. Seen: 1.005, 1.057, 1.041 and 1.321. A model of 135 million parameters has
# little to spare: e4m3 weights alone cost it 3 % (seen with a kind that no scheme uses), activations of 8 bits a few
# more, rounding to nearest 4 bits a third.
LARGEST = {"int8": 1.01, "int8_w8a8": 1.10, "fp8": 1.10, "int4_g64": 1.45}


@cache
def perplexity(scheme: str | None, cache_dir: str) -> tuple[float, str]:
    """Of the text, and how the model goes on after a beginning that it knows."""
    settings = {"max_model_len": 512, "max_num_seqs": 1, "max_num_batched_tokens": 512, "num_gpu_blocks_override": 128}
    with Engine(
        "demo", dtype="float32", quantization=scheme, show_progress=False, compilation_cache_dir=cache_dir, **settings
    ) as engine:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (output,) = engine.generate([TEXT], params)
        (answer,) = engine.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=16))
    return math.exp(-float(np.mean(prompt_logprobs(output)))), answer.outputs[0].text


@pytest.mark.parametrize("scheme", LARGEST)
def test_perplexity(scheme: str, compilation_cache: str) -> None:
    plain, _ = perplexity(None, compilation_cache)
    found, answer = perplexity(scheme, compilation_cache)
    print(f"{scheme}: {plain:.2f} -> {found:.2f}, {found / plain:.3f}; {answer!r}")
    assert 10 < plain < 40
    assert found / plain < LARGEST[scheme]
    assert "Paris" in answer
