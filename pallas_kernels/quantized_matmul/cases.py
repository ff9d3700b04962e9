"""Named workloads of the product with packed weights, shared by tests, benchmarks and the tuner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.weight import QuantizedWeight, from_dense


@dataclass(frozen=True)
class Case:
    """One product; fields as in `QuantizedMatmulProblem`, `rows_per_scale` as in `repack`, `rotation` as in
    `QuantizedWeight`.
    """

    name: str
    m: int
    k: int
    n: int
    kind: str
    group_size: int = -1
    zero_points: bool = False
    rows_per_scale: int = 1
    scale_dtype: str = "float32"
    rotation: int = 0

    def weight(self, rng: np.random.Generator) -> QuantizedWeight:
        """Random weights of variance 1/K, each output with a magnitude and (groups) each group with an offset of its
        own, so that a scale or zero point out of place shows.
        """
        dense = rng.standard_normal((self.k, self.n)) * self.k**-0.5 * rng.uniform(0.25, 4.0, self.n)
        if self.group_size > 0:
            groups = self.k // self.group_size
            dense = dense * np.repeat(rng.uniform(0.25, 4.0, (groups, 1)), self.group_size, 0)
            dense = dense + np.repeat(rng.uniform(-1, 1, (groups, self.n)), self.group_size, 0) * self.k**-0.5
        return from_dense(
            jnp.asarray(dense, jnp.float32),
            self.kind,
            self.group_size,
            zero_points=self.zero_points,
            rows_per_scale=self.rows_per_scale,
            scale_dtype=self.scale_dtype,
            rotation=self.rotation,
        )

    def activations(self, rng: np.random.Generator, dtype: Any) -> Any:
        """[M, K] unit normals, each token with a magnitude of its own."""
        return jnp.asarray(rng.standard_normal((self.m, self.k)) * rng.uniform(0.25, 4.0, (self.m, 1)), dtype)


# Small: tests compare every implementation with the reference on them.
CASES: tuple[Case, ...] = (
    Case("int8, one row", 1, 256, 384, "w8a16"),
    Case("int8, odd shapes", 7, 100, 37, "w8a16"),
    Case("int8, group 128", 8, 256, 128, "w8a16", 128),
    Case("int8, zero points", 3, 128, 96, "w8a16", 64, zero_points=True, scale_dtype="bfloat16"),
    Case("fp8", 5, 576, 192, "w8a16_fp8"),
    Case("fp8, group 64", 2, 192, 64, "w8a16_fp8", 64),
    Case("fp8, blocks, 16-bit activations", 4, 256, 192, "w8a16_fp8", 128, rows_per_scale=128),
    Case("int4, per channel", 4, 128, 128, "w4a16"),
    Case("int4, per channel, zero points", 4, 128, 128, "w4a16", zero_points=True),
    Case("int4, group 128, one row", 1, 256, 256, "w4a16", 128, scale_dtype="float16"),
    Case("int4, group 64", 16, 128, 128, "w4a16", 64),
    Case("int4, group 32, zero points", 9, 96, 128, "w4a16", 32, zero_points=True, scale_dtype="bfloat16"),
    Case("int4, group 128, zero points, prompt", 200, 256, 128, "w4a16", 128, zero_points=True),
    Case("w8a8, one row", 1, 256, 128, "w8a8"),
    Case("w8a8, odd shapes", 7, 100, 37, "w8a8"),
    Case("w8a8, group 128", 4, 256, 128, "w8a8", 128),
    Case("w8a8, prompt", 256, 128, 128, "w8a8"),
    Case("w8a8, rotated, one row", 1, 192, 128, "w8a8", rotation=64),
    Case("w8a8, rotated by 32, odd shapes", 7, 96, 37, "w8a8", rotation=32),
    Case("fp8 x fp8", 8, 256, 128, "w8a8_fp8"),
    Case("fp8 x fp8, blocks, one row", 1, 256, 192, "w8a8_fp8", 128, rows_per_scale=128),
    Case("fp8 x fp8, blocks", 130, 384, 128, "w8a8_fp8", 128, rows_per_scale=128, scale_dtype="bfloat16"),
)

_LAYERS = {  # (K, N): fused q/k/v, output, fused gate/up and down projections
    "Llama-3.1-8B": ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)),
    "Qwen3-0.6B": ((1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024)),
}
_FORMATS: dict[str, dict[str, Any]] = {
    "w4a16 g128": {"kind": "w4a16", "group_size": 128, "scale_dtype": "bfloat16"},
    "w4a16 g128 zp": {"kind": "w4a16", "group_size": 128, "zero_points": True, "scale_dtype": "bfloat16"},
    "w4a16 g32": {"kind": "w4a16", "group_size": 32, "scale_dtype": "bfloat16"},
    "w8a16": {"kind": "w8a16"},
    "w8a16 g128": {"kind": "w8a16", "group_size": 128, "scale_dtype": "bfloat16"},
    "w8a16 fp8": {"kind": "w8a16_fp8"},
    "w8a8": {"kind": "w8a8"},
    "w8a8 fp8": {"kind": "w8a8_fp8"},
    "w8a8 fp8 blocks": {"kind": "w8a8_fp8", "group_size": 128, "rows_per_scale": 128},
}
ROWS = (1, 8, 16, 32, 64, 128, 2048)

# Real layers: for benchmarks and the tuner, on a GPU.
GPU_CASES: tuple[Case, ...] = tuple(
    Case(f"{model} {k}x{n} {name} M={m}", m, k, n, **fields)
    for model, layers in _LAYERS.items()
    for k, n in layers
    for name, fields in _FORMATS.items()
    for m in ROWS
)
