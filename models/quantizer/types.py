"""What is asked of the quantizer, and what it makes of one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.errors import UnsupportedModelError

FP8_BLOCK = 128  # outputs and inputs that share a scale of 8-bit floats
METHODS = ("rtn", "gptq", "awq", "autoround")
FORMATS = ("gptq", "awq", "compressed-tensors", "fp8")
BITS = (2, 3, 4, 8)


class SettingsError(UnsupportedModelError):
    """Settings of the quantizer are out of range or contradict each other."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to quantize.

    Attributes:
        method: one of `METHODS`.
        bits: of a number.
        group_size: inputs that share a scale; -1 = all.
        sym: no zero points.
        format: one of `FORMATS`.
        act_order: columns in the order of their weight (GPTQ).
        damp: added to the diagonal of a Hessian, relative to its mean (GPTQ).
        num_samples, seq_len: calibration sequences, and tokens of each.
        steps, batch_size: of the descent (AutoRound).
        awq_scales: whether AWQ's scales are folded in before it (AutoRound).
        seed: of all that is random.

    Raises:
        SettingsError: a value is out of range, or does not go with another.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    format: str = "gptq"
    act_order: bool = False
    damp: float = 0.01
    num_samples: int = 64
    seq_len: int = 512
    steps: int = 200
    batch_size: int = 8
    awq_scales: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.method in METHODS, f"method must be one of {', '.join(METHODS)}; got {self.method!r}.")
        _check(self.format in FORMATS, f"format must be one of {', '.join(FORMATS)}; got {self.format!r}.")
        _check(self.bits in BITS, f"bits must be one of {', '.join(map(str, BITS))}; got {self.bits!r}.")
        _check(
            self.group_size == -1 or self.group_size in (32, 64, 128),
            f"group_size must be -1, 32, 64 or 128; got {self.group_size!r}.",
        )
        for name in ("num_samples", "seq_len", "steps", "batch_size"):
            _check(getattr(self, name) >= 1, f"{name} must be at least 1; got {getattr(self, name)}.")
        _check(0 < self.damp < 1, f"damp must be between 0 and 1; got {self.damp}.")
        _check(
            not self.act_order or self.method == "gptq", f"act_order is GPTQ's; {self.method} takes columns in order."
        )
        _check(
            not self.awq_scales or self.method == "autoround",
            f"awq_scales go before autoround; {self.method} has its own way.",
        )
        if self.format == "awq":
            _check(self.bits == 4 and not self.act_order, "format awq has 4 bits and columns in order.")
        if self.format == "fp8":
            _check(
                self.method in ("rtn", "gptq") and self.bits == 8 and not self.act_order,
                "format fp8 is 8-bit floats, columns in order: method rtn or gptq, bits 8.",
            )

    @property
    def scale_dtype(self) -> str:
        """In which scales are stored, "float16" or "model"."""
        return "model" if self.format == "compressed-tensors" else "float16"


@dataclass(frozen=True)
class QuantizedMatrix:
    """One projection as unsigned integers.

    Attributes:
        codes: uint8[N, K], 0 .. 2^bits - 1.
        scales: float32[N, G], exactly as they will be stored.
        zeros: int32[N, G].
        bits: of a code.
        group_size: inputs that share a scale; -1 = all.
        group_of: int32[K], group of each input; None = side by side.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    group_size: int
    group_of: np.ndarray | None = None

    @property
    def groups(self) -> np.ndarray:
        """int[K], group of each input."""
        if self.group_of is not None:
            return self.group_of
        k = self.codes.shape[1]
        return np.arange(k) // (k if self.group_size < 0 else self.group_size)

    @property
    def has_zeros(self) -> bool:
        """Whether a zero point is another than the middle."""
        return bool((self.zeros != 1 << (self.bits - 1)).any())

    def values(self) -> np.ndarray:
        """float32[N, K]."""
        groups = self.groups
        return (self.codes.astype(np.float32) - self.zeros[:, groups]) * self.scales[:, groups]


@dataclass(frozen=True)
class FloatMatrix:
    """One projection as 8-bit floats with a scale for each block of 128x128; the last may be short.

    Attributes:
        numbers: float32[N, K], each of them one of e4m3.
        scales: float32[ceil(N / 128), ceil(K / 128)].
    """

    numbers: np.ndarray
    scales: np.ndarray

    def values(self) -> np.ndarray:
        """float32[N, K]."""
        n, k = self.numbers.shape
        return self.numbers * np.repeat(np.repeat(self.scales, FP8_BLOCK, 0)[:n], FP8_BLOCK, 1)[:, :k]


Made = QuantizedMatrix | FloatMatrix
