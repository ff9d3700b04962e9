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
        rotation: inputs of a block that are turned together, 0 = none.
        num_scales: candidates among which each scale is chosen by the error of the weights.
    """

    kind: str
    group_size: int = -1
    rows_per_scale: int = 1
    scale_dtype: str = "float32"
    rotation: int = 0
    num_scales: int = 1


@dataclass(frozen=True)
class Scheme:
    """A way to quantize a model.

    Attributes:
        about: in words.
        kind, rows_per_scale, scale_dtype, num_scales: see `Storage`.
        group_sizes: the first that divides a matrix's inputs is used.
        rotations: likewise; without one that does, inputs are not turned.
        kind_without_dots: the kind on devices that have no products of such numbers; None = the same.
    """

    about: str
    kind: str
    group_sizes: tuple[int, ...] = (-1,)
    rows_per_scale: int = 1
    scale_dtype: str = "float32"
    rotations: tuple[int, ...] = ()
    num_scales: int = 1
    kind_without_dots: str | None = None

    def storage(self, inputs: int, multiplies_e4m3: bool = True) -> Storage | None:
        """Of a matrix with so many inputs, on such a device; None if no group size divides them."""
        size = next((size for size in self.group_sizes if size < 0 or inputs % size == 0), None)
        if size is None:
            return None
        rotation = next((block for block in self.rotations if inputs % block == 0), 0)
        kind = self.kind if multiplies_e4m3 else self.kind_without_dots or self.kind
        return Storage(kind, size, self.rows_per_scale, self.scale_dtype, rotation, self.num_scales)


def _int4(*group_sizes: int) -> Scheme:
    # bfloat16 scales: numbers are rounded with the scales as stored, so nothing is lost but a range of 2^-9.
    groups = " or ".join(map(str, group_sizes))
    return Scheme(f"4-bit weights in groups of {groups}", "w4a16", group_sizes, scale_dtype="bfloat16")


ROTATIONS = (64, 32, 16)  # powers of two; more inputs of a block cost more and gained nothing more
NUM_SCALES = 64
NORMS: Mapping[str, str] = {"attn.qkv.weight": "attn_norm.weight", "mlp.gate_up.weight": "mlp_norm.weight"}
"""Matrices of a layer whose inputs come out of a norm -> its weights, whose squares say how large each input is."""

SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme("8-bit weights, a scale per output", "w8a16"),
    "int8_w8a8": Scheme(
        "8-bit weights and activations, rotated, a scale per output and token", "w8a8", rotations=ROTATIONS
    ),
    "fp8": Scheme(
        "e4m3 weights, and activations where the device multiplies e4m3; a scale per output and token",
        "w8a8_fp8",
        num_scales=NUM_SCALES,
        kind_without_dots="w8a16_fp8",
    ),
    "fp8_block": Scheme(
        "the same with a scale per 128x128 block, and per token and 128 inputs",
        "w8a8_fp8",
        (128,),
        128,
        kind_without_dots="w8a16_fp8",
    ),
    "int4": _int4(128, 64, 32),
    "int4_g32": _int4(32),
    "int4_g64": _int4(64),
    "int4_g128": _int4(128),
}

KEEP_BLOCKS = "gguf"
"""The name of `quantization=` that rounds nothing: a GGUF file's own blocks stay packed."""

MATRICES = ("attn.qkv.weight", "attn.o.weight", "mlp.gate_up.weight", "mlp.down.weight")  # of a layer


def norm_of(parameter: str) -> str | None:
    """The parameter that holds the norm before a matrix; None if its inputs come out of no norm."""
    return next(
        (parameter.removesuffix(matrix) + norm for matrix, norm in NORMS.items() if parameter.endswith(matrix)), None
    )


def storages_of(config: ModelConfig, name: str, multiplies_e4m3: bool = True) -> dict[str, Storage]:
    """Parameter -> how it is stored, of those that the scheme packs: the matrices of the layers.

    Args:
        config: of the decoder.
        name: key of `SCHEMES`.
        multiplies_e4m3: whether the device has products of 8-bit floats. Without them activations stay as they are:
            to round them would cost time and precision, and gain nothing.

    Raises:
        UnsupportedModelError: no such scheme, or a matrix whose inputs no group size of it divides.
    """
    if name not in SCHEMES:
        raise UnsupportedModelError(f"quantization {name!r} is not known; known are {', '.join(SCHEMES)}.")
    storages: dict[str, Storage] = {}
    for parameter, shape in parameter_shapes(config).items():
        if not parameter.endswith(MATRICES):
            continue
        storage = SCHEMES[name].storage(shape[0], multiplies_e4m3)
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
