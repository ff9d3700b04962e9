"""The names of `quantization=`, and which parameters each of them stores how. No jax here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.config import ModelConfig
from models.errors import UnsupportedModelError
from models.parameters import parameter_shapes


@dataclass(frozen=True)
class Storage:
    """How one matrix is stored.

    Attributes:
        kind: key of `pallas_kernels.quantized_matmul.KINDS`.
        group_size: inputs that share a scale; -1 = all of them.
        rows_per_scale: outputs that share scales, counted from the first output of each projection of a fused matrix.
        scale_dtype: of the scales.
    """

    kind: str
    group_size: int = -1
    rows_per_scale: int = 1
    scale_dtype: str = "float32"


@dataclass(frozen=True)
class Scheme:
    """A way to quantize a model.

    Attributes:
        about: in words.
        kind, rows_per_scale, scale_dtype: see `Storage`.
        group_sizes: the first that divides a matrix's inputs is used.
    """

    about: str
    kind: str
    group_sizes: tuple[int, ...] = (-1,)
    rows_per_scale: int = 1
    scale_dtype: str = "float32"

    def storage(self, inputs: int) -> Storage | None:
        """Of a matrix with so many inputs; None if no group size divides them."""
        fits = (size for size in self.group_sizes if size < 0 or inputs % size == 0)
        size = next(fits, None)
        return None if size is None else Storage(self.kind, size, self.rows_per_scale, self.scale_dtype)


def _int4(*group_sizes: int) -> Scheme:
    # bfloat16 scales: numbers are rounded with the scales as stored, so nothing is lost but a range of 2^-9.
    groups = " or ".join(map(str, group_sizes))
    return Scheme(f"4-bit weights in groups of {groups}", "w4a16", group_sizes, scale_dtype="bfloat16")


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme("8-bit weights, a scale per output", "w8a16"),
    "int8_w8a8": Scheme("8-bit weights and activations, a scale per output and token", "w8a8"),
    "fp8": Scheme("e4m3 weights and activations, a scale per output and token", "w8a8_fp8"),
    "fp8_block": Scheme("e4m3, a scale per 128x128 block and per token and 128 inputs", "w8a8_fp8", (128,), 128),
    "int4": _int4(128, 64, 32),
    "int4_g32": _int4(32),
    "int4_g64": _int4(64),
    "int4_g128": _int4(128),
}

KEEP_BLOCKS = "gguf"
"""The name of `quantization=` that rounds nothing: a GGUF file's own blocks stay packed."""

MATRICES = ("attn.qkv.weight", "attn.o.weight", "mlp.gate_up.weight", "mlp.down.weight")  # of a layer


def storages_of(config: ModelConfig, name: str) -> dict[str, Storage]:
    """Parameter -> how it is stored, of those that the scheme packs: the matrices of the layers.

    Raises:
        UnsupportedModelError: no such scheme, or a matrix whose inputs no group size of it divides.
    """
    if name not in SCHEMES:
        raise UnsupportedModelError(f"quantization {name!r} is not known; known are {', '.join(SCHEMES)}.")
    storages: dict[str, Storage] = {}
    for parameter, shape in parameter_shapes(config).items():
        if not parameter.endswith(MATRICES):
            continue
        storage = SCHEMES[name].storage(shape[0])
        if storage is None:
            sizes = " or ".join(map(str, SCHEMES[name].group_sizes))
            raise UnsupportedModelError(
                f"quantization={name!r} needs inputs in groups of {sizes}, and {parameter} has {shape[0]} of them. "
                f"This model can be quantized to {', '.join(_fitting(config))}."
            )
        storages[parameter] = storage
    return storages


def _fitting(config: ModelConfig) -> list[str]:
    """Schemes that this model's sizes allow."""
    inputs = {shape[0] for name, shape in parameter_shapes(config).items() if name.endswith(MATRICES)}
    return [name for name, scheme in SCHEMES.items() if all(scheme.storage(k) is not None for k in inputs)]
