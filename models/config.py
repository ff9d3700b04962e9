"""`ModelConfig`: what a decoder is, whatever dialect its checkpoint speaks. No jax here.

A family (`models/families/`) translates a checkpoint's config into this; the decoder is built from this and nothing
else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: base of the geometric frequencies.
        rotary_dim: leading dims of each head that rotate (= head_dim unless partial).
        scaling: "default", "linear", "llama3" or "yarn".
        factor and the rest: parameters of the scaling, as in Hugging Face's `rope_parameters`.
        original_max_position: context length before scaling.
    """

    theta: float
    rotary_dim: int
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position: int = 0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class LayerConfig:
    """What differs between the layers of one model.

    Attributes:
        window: a query at position p sees keys of positions (p - window, p]; None = all.
        use_rope: False for NoPE layers.
    """

    window: int | None = None
    use_rope: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
        family: name of the recipe that made this config.
        dtype: the checkpoint's own dtype ("float32", "bfloat16", "float16").
        layers: one entry per layer.
        activation: of the gated MLP, "silu" or "gelu_tanh".
        qkv_bias, o_bias, mlp_bias: which projections have a bias.
        qk_norm: RMSNorm over each head's q and k before rope (Qwen3).
        eos_token_ids: ids that end a sequence, from the generation config if there is one.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    layers: tuple[LayerConfig, ...]
    dtype: str = "float32"
    activation: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads."""
        return self.num_kv_heads * self.head_dim
