"""Settings that were left open, resolved for the model and the device at hand."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from engine.config import EngineConfig
from engine.errors import ConfigError
from models.config import ModelConfig

CPU_SEQS, CPU_TOKENS = 64, 2048
GPU_SEQS, GPU_TOKENS = 256, 8192
KV_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}  # kv_cache_dtype -> JAX's name


@dataclass(frozen=True)
class RuntimeLimits:
    """What the executables are built for.

    Attributes:
        max_num_seqs: R, rows of the device state and most sequences in a step.
        max_num_batched_tokens: most tokens in a step.
        max_model_len: longest sequence, in tokens.
        block_size: P.
        dtype: of weights and activations.
        kv_dtype: of the KV cache.
        num_drafts: most drafts of a sequence in a step; 0 without speculative decoding.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    dtype: str
    kv_dtype: str
    num_drafts: int = 0

    @property
    def max_blocks_per_seq(self) -> int:
        """B, entries of a block table."""
        return -(-self.max_model_len // self.block_size)


def resolve_limits(
    config: EngineConfig, model: ModelConfig, dtype: str, kv_cache_dtype: str | None = None, on_cpu: bool | None = None
) -> RuntimeLimits:
    """Fill in what the user left open.

    Args:
        config: what the user said.
        model: the decoder.
        dtype: of activations.
        kv_cache_dtype: what the checkpoint wants where the user says "auto"; None = `dtype`.
        on_cpu: whether the defaults are those of a CPU; None = as this process's device is.

    Raises:
        ConfigError: the settings contradict the model or each other.
    """
    on_cpu = jax.devices()[0].platform == "cpu" if on_cpu is None else on_cpu
    longest = model.max_position_embeddings
    length = config.load.max_model_len or longest
    if length > longest:
        raise ConfigError(
            f"max_model_len={length} exceeds the {longest} positions that this model was made for. "
            f"Set it to {longest} or less."
        )
    seqs = config.scheduler.max_num_seqs or (CPU_SEQS if on_cpu else GPU_SEQS)
    tokens = config.scheduler.max_num_batched_tokens or max(seqs, CPU_TOKENS if on_cpu else GPU_TOKENS)
    if not config.scheduler.enable_chunked_prefill:
        if config.scheduler.max_num_batched_tokens is None:
            tokens = max(tokens, length)
        elif tokens < length:
            raise ConfigError(
                f"max_num_batched_tokens={tokens} is below max_model_len={length}: "
                "without chunked prefill a whole prompt must fit in a step."
            )
    if tokens < seqs:
        raise ConfigError(
            f"max_num_batched_tokens={tokens} must be at least max_num_seqs={seqs}: "
            "each running sequence needs a token per step."
        )
    speculative = config.speculative.settings
    num_drafts = 0 if speculative is None else speculative.num_speculative_tokens
    if num_drafts + 1 > tokens:
        raise ConfigError(
            f"speculative_config: num_speculative_tokens={num_drafts} and a token of the sequence do not fit in "
            f"max_num_batched_tokens={tokens}."
        )
    asked = config.cache.kv_cache_dtype
    kv_dtype = KV_DTYPES.get((kv_cache_dtype or asked) if asked == "auto" else asked, dtype)
    return RuntimeLimits(seqs, tokens, length, config.cache.block_size, dtype, kv_dtype, num_drafts)
