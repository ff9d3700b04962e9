"""SmolLM2 from GGUF blocks that stay packed, beside the same file dequantized."""

from __future__ import annotations

import numpy as np
import pytest

from engine.engine import Engine
from engine.sampling_params import SamplingParams
from tests.engine.helpers import prompt_logprobs

pytestmark = pytest.mark.slow


def test_demo(compilation_cache: str) -> None:
    """The same greedy text. Products differ in the order of sums, and activations meet packed weights in fixed point:
    log-probabilities were off by 2.1e-5 at most.
    """
    prompts = ["The capital of France is", "Water boils at", "def fibonacci(n):"]
    texts, logprobs, about = {}, {}, {}
    for way in (None, "gguf"):
        with Engine(
            "demo",
            dtype="float32",
            quantization=way,
            max_model_len=128,
            max_num_seqs=1,
            num_gpu_blocks_override=32,
            show_progress=False,
            compilation_cache_dir=compilation_cache,
        ) as engine:
            outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=24, prompt_logprobs=0))
            texts[way] = [output.outputs[0].text for output in outputs]
            logprobs[way] = np.concatenate([prompt_logprobs(output) for output in outputs])
            about[way] = engine.describe()
    worst = float(np.abs(logprobs["gguf"] - logprobs[None]).max())
    print(f"{about['gguf']['quantization']}; {about['gguf']['memory']}; {about[None]['memory']}; off by {worst:.2e}")
    assert about["gguf"]["quantization"] == "gguf (w4a16, group 32: qkv, o, gate_up, down)"
    assert 0 < worst < 2e-4
    assert texts["gguf"] == texts[None]
