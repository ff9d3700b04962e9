"""Writes tests/golden/quantized/autoround-*: a tiny random model, exported by AutoRound itself in each of its layouts.

Rounding to nearest only (`iters=0`): no calibration data, and nothing to download. Beside each checkpoint lies
`golden.npz` with what AutoRound's own classes make of it: the values of some matrices, float32[out, in], and the logits
that `transformers` computes in float32 with the values of all of them.

Environment (CPU is enough), and usage from tests/golden:

    python3.11 -m venv golden-env
    golden-env/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
    golden-env/bin/pip install safetensors==0.8.0 datasets py-cpuinfo
    golden-env/bin/pip install --no-deps auto-round==0.16.1 compressed-tensors==0.20.0
    OMP_NUM_THREADS=1 golden-env/bin/python -m making.auto_round
"""

import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch.qlinear_torch import QuantLinear as RawZeroPoints
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as ZeroPointsMinusOne
from compressed_tensors.compressors import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parents[1] / "quantized"
SEED, GROUP_SIZE, VOCAB = 20261125, 32, 64
LAYER = "model.layers.0."
# Values that are stored; the others show in the logits.
SHOWN = [f"{LAYER}{name}_proj" for name in ("self_attn.q", "self_attn.k", "mlp.up", "mlp.down")]
MIXED = {f"{LAYER}self_attn.k_proj": {"bits": 8}, "o_proj": {"bits": 16}, f"{LAYER}mlp.down_proj": {"group_size": 16}}

# name -> (options of AutoRound, export format)
EXPORTS: dict[str, tuple[dict[str, Any], str]] = {
    "autoround-sym4": ({"bits": 4, "sym": True}, "auto_round"),
    "autoround-sym8": ({"bits": 8, "sym": True}, "auto_round"),
    "autoround-asym2": ({"bits": 2, "sym": False}, "auto_round"),
    "autoround-asym3": ({"bits": 3, "sym": False}, "auto_round"),
    "autoround-asym4-gptq": ({"bits": 4, "sym": False}, "auto_round:auto_gptq"),
    "autoround-asym4-awq": ({"bits": 4, "sym": False}, "auto_round:auto_awq"),
    "autoround-mixed": ({"bits": 4, "sym": True, "layer_config": MIXED}, "auto_round"),
    "autoround-mxfp4": ({"scheme": "MXFP4"}, "auto_round"),
    "autoround-to-awq": ({"bits": 4, "sym": False}, "auto_awq"),
    "autoround-to-gptq": ({"bits": 4, "sym": True}, "auto_gptq"),
}


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-3,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    )


def _model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(_config()).to(torch.float16)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"t{index}": index for index in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")))


def _values(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """module -> float32[out, in], by AutoRound's own layers: their products with an identity matrix, scales widened."""
    layout = config.get("packing_format", config["quant_method"])
    values = {}
    if layout == "auto_round:llm_compressor":
        (scheme,) = QuantizationConfig(config_groups={"MXFP4": ["Linear"]}).config_groups.values()
        for module in sorted(name.removesuffix(".weight_packed") for name in tensors if name.endswith("_packed")):
            stored = {role: tensors[f"{module}.{role}"] for role in ("weight_packed", "weight_scale")}
            values[module] = MXFP4PackedCompressor.decompress(stored, scheme)["weight"].float()
    for module in sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        qweight, qzeros, scales = (tensors[f"{module}.{role}"] for role in ("qweight", "qzeros", "scales"))
        scales = scales.float()
        if "awq" in layout:
            values[module] = dequantize_gemm(qweight, qzeros, scales, 4, qweight.shape[0] // scales.shape[0]).T
            continue
        outputs = scales.shape[1]
        bits = qzeros.shape[1] * 32 // outputs
        inputs = qweight.shape[0] * 32 // bits
        kind = RawZeroPoints if layout == "auto_round" else ZeroPointsMinusOne
        layer = kind(bits, inputs // scales.shape[0], inputs, outputs, False)
        layer.qweight, layer.qzeros, layer.scales = qweight, qzeros, scales
        values[module] = layer(torch.eye(inputs)).T
    return values


@torch.no_grad()
def _golden(directory: Path) -> dict[str, np.ndarray]:
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    tensors = load_file(directory / "model.safetensors")
    values = _values(tensors, config)
    packed = {"qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale"}
    plain = {name: tensor.float() for name, tensor in tensors.items() if name.rpartition(".")[2] not in packed}
    model = LlamaForCausalLM(_config()).eval()
    model.load_state_dict(plain | {f"{module}.weight": value for module, value in values.items()})
    prompt = np.random.default_rng(SEED).integers(3, VOCAB, 40)
    logits = model(torch.from_numpy(prompt)[None]).logits[0]
    shown = {module: values[module].numpy() for module in SHOWN if module in values}
    return {"prompt": prompt.astype(np.int32), "logits": logits.numpy(), **shown}


def _make(name: str) -> None:
    options, layout = EXPORTS[name]
    with tempfile.TemporaryDirectory() as scratch:
        maker = AutoRound(
            _model(),
            _tokenizer(),
            iters=0,
            disable_opt_rtn=True,
            device_map="cpu",
            group_size=GROUP_SIZE,
            **options,
        )
        maker.quantize_and_save(scratch, format=layout)
        (made,) = Path(scratch).rglob("model.safetensors")
        directory = OUT / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(made.parent / file, directory / file)
    np.savez_compressed(directory / "golden.npz", **_golden(directory))
    packages = ("auto-round", "torch", "transformers", "safetensors", "numpy")
    provenance = {
        "made_by": "tests/golden/making/auto_round.py",
        "seed": SEED,
        "versions": {package: version(package) for package in packages},
        "options": options,
        "format": layout,
    }
    (directory / "golden.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    for each in sys.argv[1:] or EXPORTS:
        _make(each)
