"""The whole engine on the simulated GPU kernel: prompts in chunks, decode rows and both in one step, as on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.sampling_params import SamplingParams
from tests.kernels.simulated import simulated

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "dtype": "bfloat16",
    "max_model_len": 64,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "num_gpu_blocks_override": 16,
    "skip_tokenizer_init": True,
    "show_progress": False,
    "compilation_cache_dir": "",
}
PROMPTS = [[5, 9, 200, 17, 3], [7] * 20]  # the second is longer than a step: it is computed beside the first's decoding
NUM_TOKENS = 6


def greedy(directory: str, implementation: str) -> tuple[list[tuple[int, ...]], str]:
    """Token ids of each prompt, and what the engine says it ran."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with Engine(directory, attention_implementation=implementation, **SETTINGS) as engine:
        tokens = [output.outputs[0].token_ids for output in engine.generate(PROMPTS, params)]
        return tokens, engine.describe()["implementations"]["paged_attention"]


@pytest.mark.slow
def test_tokens_equal_those_of_xla(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    kernel, ran = simulated(greedy, str(tmp_path), "mosaic_gpu_simulated", timeout_s=400.0)
    assert ran.startswith("mosaic_gpu_simulated")
    xla, ran = greedy(str(tmp_path), "xla")
    assert ran.startswith("xla") and len(set(xla[0])) > 3, "a continuation that repeats itself proves little"
    assert kernel == xla
