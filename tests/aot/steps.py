"""Whole steps of real models, compiled for a GPU from shapes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from engine.runtime.buckets import Bucket
from engine.runtime.executables import ModelProgram
from engine.runtime.limits import RuntimeLimits
from models.config import ModelConfig
from models.decoder import Decoder
from models.functional import FunctionalModel
from models.registry import resolve_family
from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.paged_attention import AttentionProblem

# As in the models' own config.json, fields without influence on the program left out.
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": 128001,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 28,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": 151645,
    },
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
    },
}
PAGE_SIZE = 16
NUM_PAGES = 32768  # so many that a copy of one layer's pages is more than all other temporaries


def model_config(name: str, num_layers: int | None = None) -> ModelConfig:
    """A model's config by the families' own translation; with fewer layers if asked for."""
    raw = CONFIGS[name]
    config = resolve_family(raw["architectures"]).translate(raw, {})
    return config if num_layers is None else replace(config, layers=config.layers[:num_layers])


def program_of(config: ModelConfig, implementation: str, *, max_num_seqs: int = 256) -> ModelProgram:
    """The engine's program of a model, as `engine.builder` puts it together, in bfloat16."""
    dtype = "bfloat16"
    limits = RuntimeLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=8192,
        max_model_len=min(config.max_position_embeddings, 32768),
        block_size=PAGE_SIZE,
        dtype=dtype,
    )
    problem = AttentionProblem(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=PAGE_SIZE,
        dtype=dtype,
        kv_dtype=dtype,
        implementation=implementation,
    )
    cache = KVLayout(NUM_PAGES, config.num_kv_heads, PAGE_SIZE, config.head_dim, dtype)
    return ModelProgram(FunctionalModel(lambda: Decoder(config, problem, dtype=dtype)), config, limits, cache)


def lower_step(program: ModelProgram, bucket: Bucket) -> jax.stages.Lowered:
    """The forward pass of one bucket; call for a device, inside `compile_lowered`."""
    params = {name: jax.ShapeDtypeStruct(s.shape, s.dtype) for name, s in program.model.shapes.items()}
    return program.lower_forward(bucket, params)


def state_bytes(program: ModelProgram) -> int:
    """Bytes of the donated state."""
    state, _ = program.state_shapes()
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))


def page_bytes(program: ModelProgram) -> int:
    """Bytes of one layer's pages."""
    return program.cache.page_bytes * program.cache.num_pages
