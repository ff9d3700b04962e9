"""GGUF files as checkpoints: the config (`gguf_config`) and the tensors under Hugging Face's names and layouts.

llama.cpp stores the same matrices under its own names, most of them quantized in blocks along each row, and for some
architectures with the rows of q and k reordered. A reader gets float32 in the layout of `model.safetensors`, or, where
it asks for them, the blocks of the layers' matrices and of the head as they are stored, rows in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

from models.errors import UnsupportedModelError, WeightsError
from models.loading.gguf_config import architecture_of, gguf_config
from models.loading.gguf_file import GgufFile, GgufTensor, read_gguf
from models.quantization.gguf import KINDS as PACKABLE
from models.quantization.gguf import packed_name

__all__ = ["SUPPORTED_KINDS", "GgufTensors", "gguf_config", "read_gguf"]

SUPPORTED_KINDS = (
    Kind.F32,
    Kind.F16,
    Kind.BF16,
    Kind.Q8_0,
    Kind.Q4_0,
    Kind.Q4_1,
    Kind.Q5_0,
    Kind.Q5_1,
    Kind.Q4_K,
    Kind.Q5_K,
    Kind.Q6_K,
)

_HEAD = "output.weight"
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    _HEAD: "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"^blk\.(\d+)\.(\w+)\.(weight|bias)$")
# Part of the config, or derived from it (old converters stored the frequencies of each layer).
_NO_WEIGHT = re.compile(r"^(rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?)$")


def hf_name(name: str) -> str | None:
    """Hugging Face's name of a stored tensor; None if it has none."""
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK_NAME.match(name)
    if match is None or match[2] not in _BLOCK:
        return None
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"


def _unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo `LlamaModel.permute`: within each head, rows (0, D/2, 1, D/2+1, …) go back to (0, 1, …, D-1)."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _is_packable(tensor: GgufTensor) -> bool:
    """Whether a tensor is a matrix of a layer, or the head, in blocks that the device can hold as they are."""
    is_matrix = len(tensor.shape) == 2 and (tensor.name == _HEAD or _BLOCK_NAME.match(tensor.name) is not None)
    return is_matrix and tensor.kind.name in PACKABLE


class GgufTensors:
    """The tensors of one model: Hugging Face names → float32 arrays, dequantized when read.

    Args:
        file: the model.
        packed: whether matrices in blocks of `PACKABLE` kinds are given as blocks instead, under the name
            `packed_name`: uint8[out, bytes of a row].

    Raises:
        UnsupportedModelError: on construction, if the architecture is not supported, a tensor has no counterpart in
            it, or is stored in a type that cannot be dequantized.
    """

    def __init__(self, file: GgufFile, *, packed: bool = False) -> None:
        architecture = architecture_of(file)
        self._path = file.path
        self._tensors: dict[str, GgufTensor] = {}
        self._packed: set[str] = set()
        for stored, tensor in file.tensors.items():
            name = hf_name(stored)
            if name is not None:
                self._check_kind(tensor)
                if packed and _is_packable(tensor):
                    name = packed_name(name, tensor.kind.name)
                    self._packed.add(name)
                self._tensors[name] = tensor
            elif not _NO_WEIGHT.match(stored):
                raise UnsupportedModelError(
                    f"Tensor {stored!r} of {file.path.name} is unknown for {architecture.hf_class}."
                )
        self._permuted_heads: dict[str, int] = {}
        if architecture.permuted:
            config = gguf_config(file)
            self._permuted_heads = {
                "attn_q": config["num_attention_heads"],
                "attn_k": config["num_key_value_heads"],
            }

    def _check_kind(self, tensor: GgufTensor) -> None:
        if tensor.kind not in SUPPORTED_KINDS:
            supported = ", ".join(kind.name for kind in SUPPORTED_KINDS)
            raise UnsupportedModelError(
                f"Tensor {tensor.name!r} of {self._path.name} is stored as {tensor.kind.name}; supported: {supported}."
            )

    @property
    def path(self) -> Path:
        """The file (the first part of a split model)."""
        return self._path

    def names(self) -> Collection[str]:
        """Hugging Face names, in the order of the file."""
        return self._tensors.keys()

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._tensors:
            raise WeightsError(f"{self._path.name} has no tensor {name!r}.")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as in `model.safetensors`: `[out, in]` for a projection, `[V, E]` for the embedding. Of blocks: that of
        their bytes.
        """
        tensor = self._tensor(name)
        return tensor.rows.shape if name in self._packed else tensor.shape

    def dtype(self, name: str) -> str:
        """What `read` gives: float32, uint8 of blocks."""
        return self._tensor(name) and ("uint8" if name in self._packed else "float32")

    def kind(self, name: str) -> str:
        """How the values are stored, e.g. `Q4_1`."""
        return self._tensor(name).kind.name

    def read(self, name: str) -> np.ndarray:
        """The values, float32, or the blocks, uint8; contiguous; may be a read-only view of the file.

        Raises:
            WeightsError: there is no such tensor, or its rows do not fit the number of heads.
        """
        tensor = self._tensor(name)
        values = tensor.rows if name in self._packed else tensor.values()
        match = _BLOCK_NAME.match(tensor.name)
        num_heads = self._permuted_heads.get(match[2]) if match else None
        if num_heads is None:
            return values
        if values.shape[0] % (2 * num_heads):
            raise WeightsError(
                f"Tensor {name!r} of {self._path.name}: {values.shape[0]} rows cannot be split over {num_heads} heads."
            )
        return np.ascontiguousarray(_unpermute(values, num_heads))
