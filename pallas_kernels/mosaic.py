"""What the Mosaic GPU kernels share: layouts of shared memory, and the spots where the simulator needs other words.

A kernel's body is written once and runs compiled for Hopper and in JAX's simulator of a GPU (`simulate=True`), which
checks numbers and races on any machine. The simulator knows no register layouts and no wgmma with an operand in
registers; `Hopper` hides exactly those spots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

MASKED = -1e30  # finite: exp2(MASKED - MASKED) must not be NaN in rows that see nothing yet
LOG2E = math.log2(math.e)
SMEM_LIMIT = 232448  # bytes of shared memory that one block may use on Hopper (227 KiB)
ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage] - public, but not in its module's __all__
SWIZZLES = (128, 64, 32)
ROWS_OF_TILE = 8  # offsets of copies into or out of tiled shared memory must be multiples of it, or data is wrong


def simulator(*, detect_races: bool = True) -> Any:
    """The `interpret` argument of `plgpu.kernel` that runs a kernel in the simulator."""
    return plgpu.InterpretGPUParams(detect_races=detect_races)


def compiler_params() -> plgpu.CompilerParams:
    """Of every kernel here."""
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def bits_of(dtype: Any) -> int:
    """Width of an element, 4 for int4."""
    dtype = jnp.dtype(dtype)
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else dtype.itemsize * 8


def swizzle_of(minor: int, dtype: Any) -> int | None:
    """Bytes of the widest swizzle that rows of `minor` elements allow, None if none does."""
    row_bytes = minor * bits_of(dtype) // 8
    return next((s for s in SWIZZLES if row_bytes % s == 0), None)


def mma_transforms(minor: int, dtype: Any) -> tuple[Any, ...]:
    """Tiling and swizzle of a shared memory buffer that wgmma reads.

    Raises:
        ValueError: rows of `minor` elements have no swizzle; `supports` must have refused them.
    """
    swizzle = swizzle_of(minor, dtype)
    if swizzle is None:
        raise ValueError(f"rows of {minor} {jnp.dtype(dtype)} have no swizzle: their bytes are not a multiple of 32")
    tiling: Any = plgpu.TilingTransform  # for pyright both are abstract
    swizzling: Any = plgpu.SwizzleTransform
    return (tiling((ROWS_OF_TILE, swizzle * 8 // bits_of(dtype))), swizzling(swizzle))


def i32(value: Any) -> jax.Array:
    """An int32 scalar: Python integers would become int32 or int64 as the mode says."""
    return jnp.asarray(value, jnp.int32)


@dataclass(frozen=True)
class Hopper:
    """The words of a kernel body that differ between a GPU and the simulator.

    Attributes:
        simulate: whether the body runs in the simulator.
    """

    simulate: bool

    @property
    def interpret(self) -> Any:
        """For `plgpu.kernel`."""
        return simulator() if self.simulate else None

    def cast(self, x: jax.Array, layout: Any) -> jax.Array:
        """`x` in another register layout."""
        return x if self.simulate else plgpu.layout_cast(x, layout)

    def iota(self, shape: tuple[int, ...], axis: int, layout: Any = None) -> jax.Array:
        """int32, counting along an axis."""
        if self.simulate:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout or plgpu.Layout.WGMMA)

    def load(self, ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
        """A buffer's content in a register layout."""
        return ref[...] if self.simulate else plgpu.load(ref, layout=layout, optimized=optimized)

    def load_narrow(self, ref: Any, dtype: Any) -> jax.Array:
        """Packed weights or quantized keys of 4 or 8 bits in shared memory, widened, as a wgmma operand in registers.

        Loads wide words first and moves them into the layout while they are narrow: 2 matrix loads instead of 32 loads
        of bytes.
        """
        bits = bits_of(ref.dtype)
        if self.simulate:
            x = ref[...]
        else:
            layout = plgpu.Layout.WGMMA_UPCAST_4X if bits == 4 else plgpu.Layout.WGMMA_UPCAST_2X
            x = plgpu.layout_cast(plgpu.load(ref, layout=layout), plgpu.Layout.WGMMA)
        if x.dtype == jnp.float8_e4m3fn:
            x = x.astype(jnp.float16)  # exact; Hopper has no conversion from e4m3 to bfloat16
            if jnp.dtype(dtype) == jnp.bfloat16:
                x = x.astype(jnp.float32)
        return x.astype(dtype)

    def dot(self, a_ref: Any, b_ref: Any, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
        """`a @ b`, both in shared memory, in a fresh accumulator."""

        def product(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, a_ref, b_ref)
            return acc[...]

        return pl.run_scoped(product, ACC(shape, dtype))

    def dot_registers(self, a: jax.Array, b_ref: Any, shape: tuple[int, int]) -> jax.Array:
        """float32 `a @ b`, `a` in registers, `b` in shared memory, in a fresh accumulator."""
        if self.simulate:
            out = jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # as in `add_dot`
            return out

        def product(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, a, b_ref)
            return acc[...]

        return pl.run_scoped(product, ACC(shape, jnp.float32))

    def add_dot(self, acc: jax.Array, a: jax.Array, b_ref: Any) -> Any:
        """`acc + a @ b`, `a` in registers, `b` in shared memory."""
        if self.simulate:
            out = acc + jnp.dot(a, b_ref[...], preferred_element_type=acc.dtype)
            plgpu.commit_smem()  # the simulator reads b as threads do, the real wgmma through the async proxy
            return out

        def add(acc_ref: Any) -> None:
            plgpu.wgmma(acc_ref, a, b_ref)

        return pl.run_state(add)(ACC.init(acc))
