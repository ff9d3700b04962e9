"""The specification of the row-wise passes: float32, rounded where `api` says so."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.rowwise.problem import Heads


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """See `api.norm`."""
    wide = x.astype(jnp.float32)
    rms = jnp.sqrt((wide**2).sum(-1, keepdims=True) / x.shape[-1] + eps)
    return ((wide / rms).astype(x.dtype).astype(jnp.float32) * weight.astype(jnp.float32)).astype(x.dtype)


def add_norm(x: jax.Array, residual: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """See `api.add_norm`."""
    total = (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(x.dtype)
    return norm(total, weight, eps), total


def gate(gate_up: jax.Array, activation: str) -> jax.Array:
    """See `api.gate`."""
    size = gate_up.shape[-1] // 2
    x, up = gate_up[:, :size].astype(jnp.float32), gate_up[:, size:].astype(jnp.float32)
    if activation == "silu":
        y = x / (1 + jnp.exp(-x))
    elif activation == "gelu_tanh":
        y = 0.5 * x * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3)))
    else:
        y = 0.5 * x * (1 + jax.lax.erf(x / jnp.sqrt(2.0)))
    return (y.astype(gate_up.dtype).astype(jnp.float32) * up).astype(gate_up.dtype)


def turns(angles: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """See `api.turns`."""
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def heads(
    qkv: jax.Array,
    layout: Heads,
    turned: tuple[jax.Array, jax.Array] | None,
    norms: tuple[jax.Array, jax.Array] | None,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.heads`."""
    all_heads = qkv.reshape(qkv.shape[0], -1, layout.dim)
    q, k = all_heads[:, : layout.num_q], all_heads[:, layout.num_q : layout.num_q + layout.num_kv]
    v = all_heads[:, layout.num_q + layout.num_kv :]
    if norms is not None:
        q, k = norm(q, norms[0], eps), norm(k, norms[1], eps)
    if turned is not None:
        q, k = (_rotate(x, *turned) for x in (q, k))
    return q, k, v


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    size = cos.shape[-1]
    half = size // 2
    a, b = x[..., :half].astype(jnp.float32), x[..., half:size].astype(jnp.float32)
    c, s = cos[:, None, :half], sin[:, None, half:]
    turned = jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., size:]], axis=-1)


FUNCTIONS = {"norm": norm, "add_norm": add_norm, "gate": gate, "turns": turns, "heads": heads}
