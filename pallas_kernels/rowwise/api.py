"""The signatures of the row-wise passes, and their dispatch."""

from __future__ import annotations

import jax

from pallas_kernels.op import AUTO, Implementation, Op
from pallas_kernels.rowwise import native_cpu, reference, xla
from pallas_kernels.rowwise.problem import Heads, RowwiseProblem


def _everything(problem: RowwiseProblem) -> str | None:
    del problem
    return None


OP = Op(
    name="rowwise",
    implementations=(
        Implementation("native_cpu", native_cpu.FUNCTIONS, native_cpu.supports, native_cpu.device_reason),
        Implementation("xla", xla.FUNCTIONS, _everything),
        Implementation("reference", reference.FUNCTIONS, _everything),
    ),
    automatic=("native_cpu", "xla"),
)


def norm(x: jax.Array, weight: jax.Array, eps: float, implementation: str = AUTO) -> jax.Array:
    """Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467) over the last axis.

    Args:
        x: [..., E].
        weight: [E], in x's dtype.
        eps: added to the mean square.
        implementation: "auto" or a name (strict).

    Returns:
        As x: `round(x / rms) * weight`.
    """
    chosen = OP.choose(implementation, RowwiseProblem("norm", str(x.dtype)))
    return chosen.functions["norm"](x, weight, eps)


def add_norm(
    x: jax.Array, residual: jax.Array, weight: jax.Array, eps: float, implementation: str = AUTO
) -> tuple[jax.Array, jax.Array]:
    """The norm of a sum, and the sum: what a block does between its two halves.

    Args:
        x, residual: [T, E].
        weight, eps, implementation: as of `norm`.

    Returns:
        [T, E] each: `norm(x + residual)`, `x + residual`.
    """
    chosen = OP.choose(implementation, RowwiseProblem("norm", str(x.dtype)))
    return chosen.functions["add_norm"](x, residual, weight, eps)


def gate(gate_up: jax.Array, activation: str, implementation: str = AUTO) -> jax.Array:
    """`act(gate) * up` (Shazeer 2020, arXiv 2002.05202).

    Args:
        gate_up: [T, 2F], gates first.
        activation: one of `ACTIVATIONS`; "gelu_tanh" is the approximation of Hendrycks and Gimpel 2016.
        implementation: "auto" or a name (strict).

    Returns:
        [T, F].
    """
    chosen = OP.choose(implementation, RowwiseProblem("gate", str(gate_up.dtype), activation))
    return chosen.functions["gate"](gate_up, activation)


def turns(angles: jax.Array, scale: float, implementation: str = AUTO) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for `heads`.

    Args:
        angles: float32[T, R / 2].
        scale: multiplies both.
        implementation: "auto" or a name (strict).

    Returns:
        float32[T, R] each: both halves of the cosines are the same, those of the sines differ in sign, the first is
        negative.
    """
    chosen = OP.choose(implementation, RowwiseProblem("turns", str(angles.dtype)))
    return chosen.functions["turns"](angles, scale)


def heads(
    qkv: jax.Array,
    layout: Heads,
    turned: tuple[jax.Array, jax.Array] | None,
    norms: tuple[jax.Array, jax.Array] | None,
    eps: float,
    implementation: str = AUTO,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A fused projection as heads: queries and keys normed and rotated where the model does so, in that order.

    Args:
        qkv: [T, (H + 2K) * D].
        layout: what lies where.
        turned: `turns` of the positions, float32[T, R] each; the leading R dims of each head are rotated, in halves
            (dim i with i + R/2), as Hugging Face stores its weights. None = not rotated.
        norms: [D] each, weights of the norms of queries and keys. None = not normed.
        eps: of the norms.
        implementation: "auto" or a name (strict).

    Returns:
        q [T, H, D], k [T, K, D], v [T, K, D].
    """
    chosen = OP.choose(implementation, RowwiseProblem("heads", str(qkv.dtype)))
    return chosen.functions["heads"](qkv, layout, turned, norms, eps)
