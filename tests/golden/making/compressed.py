"""Writes tests/golden/quantized/llmcompressor-*: a tiny random model, quantized and saved by llm-compressor itself.

Each of compressed-tensors' formats that Quire loads, with the options that change its tensors: signs, groups, order of
columns, scales measured beforehand. Random tokens calibrate it. `golden.npz` holds what the tools make of the file:

- the values of four matrices, float32[out, in], as compressed-tensors decompresses them with scales in float32;
- a prompt, and `logits` that transformers computes in float32 with the values of all matrices, activations as they are;
- `quantized_logits`, where the config quantizes activations: the same with inputs of every matrix rounded by
  compressed-tensors' own functions. Not so with integers measured at run time: the largest becomes 127 there, as in
  vLLM's kernels and Quire's, where compressed-tensors says 127.5; and where weights have groups, inputs have them too.

Environment (CPU is enough), and usage from tests/golden:

    python3.11 -m venv golden-env
    golden-env/bin/pip install torch==2.13.0 transformers==5.17.0 accelerate==1.15.0 safetensors==0.8.0
    golden-env/bin/pip install datasets loguru pyyaml requests pillow nvidia-ml-py
    golden-env/bin/pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0 auto-round==0.15.1
    OMP_NUM_THREADS=1 golden-env/bin/python -m making.compressed
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.nn import Module
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parents[1] / "quantized"
SEED, VOCAB, NUM_SAMPLES, SAMPLE_LENGTH = 20261125, 64, 16, 32
SHOWN = [f"model.layers.0.{name}_proj" for name in ("self_attn.q", "self_attn.k", "mlp.up", "mlp.down")]
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
TOKEN = {"strategy": "token", "dynamic": True}
STATIC = {"strategy": "tensor", "dynamic": False}
SMALL_FLOAT = {"num_bits": 4, "type": "float", "symmetric": True}


def _group(weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs} | more


def _groups(bits: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    return _group(weights | more)


def _per_output(bits: int, symmetric: bool) -> dict[str, Any]:
    return _group({"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel"})


# name -> (modifier, group of modules, other options of the modifier)
MADE: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "w4a16-sym": (QuantizationModifier, _groups(4, True), {}),
    "w4a16-asym": (QuantizationModifier, _groups(4, False), {}),
    "w4a16-channel": (QuantizationModifier, _per_output(4, True), {}),
    "w4a16-order": (GPTQModifier, _groups(4, False, actorder="static"), {}),
    "w3a16-asym": (QuantizationModifier, _groups(3, False), {}),
    "w8a16": (QuantizationModifier, _groups(8, True), {}),
    "w8a16-asym-channel": (QuantizationModifier, _per_output(8, False), {}),
    "w8a8": (QuantizationModifier, _group(INT8 | {"strategy": "channel"}, INT8 | TOKEN), {}),
    "w8a8-static": (QuantizationModifier, _group(INT8 | {"strategy": "channel"}, INT8 | STATIC), {}),
    "w8a8-static-asym": (
        QuantizationModifier,
        _group(INT8 | {"strategy": "tensor"}, INT8 | STATIC | {"symmetric": False}),
        {},
    ),
    "w4a8": (QuantizationModifier, _groups(4, True) | {"input_activations": INT8 | TOKEN}, {}),
    "fp8-tensor-static": (QuantizationModifier, _group(FLOAT8 | {"strategy": "tensor"}, FLOAT8 | STATIC), {}),
    "fp8-channel-static": (QuantizationModifier, _group(FLOAT8 | {"strategy": "channel"}, FLOAT8 | STATIC), {}),
    "fp8-channel": (QuantizationModifier, _group(FLOAT8 | {"strategy": "channel"}, FLOAT8 | TOKEN), {}),
    "fp8-block": (
        QuantizationModifier,
        _group(
            FLOAT8 | {"strategy": "block", "block_structure": [32, 32]},
            FLOAT8 | {"strategy": "group", "group_size": 32, "dynamic": True},
        ),
        {},
    ),
    "fp8-weight-only": (QuantizationModifier, _group(FLOAT8 | {"strategy": "channel"}), {}),
    "fp8-kv": (
        QuantizationModifier,
        _group(FLOAT8 | {"strategy": "tensor"}, FLOAT8 | STATIC),
        {"kv_cache_scheme": FLOAT8 | STATIC},
    ),
    "nvfp4a16": (
        QuantizationModifier,
        _group(SMALL_FLOAT | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}),
        {},
    ),
    "mxfp4a16": (
        QuantizationModifier,
        _group(SMALL_FLOAT | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
        {},
    ),
    "mxfp8a16": (
        QuantizationModifier,
        _group(FLOAT8 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
        {},
    ),
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


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"t{index}": index for index in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), pad_token="t0")


def _quantize(name: str, directory: Path) -> None:
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(_config())
    for parameter, value in model.named_parameters():
        if "norm" in parameter:  # with ones, the first layer's inputs are ratios that lie halfway between numbers
            torch.nn.init.uniform_(value, 0.5, 1.5)
    with tempfile.TemporaryDirectory() as scratch:
        model.to(torch.bfloat16).save_pretrained(scratch)
        _oneshot(LlamaForCausalLM.from_pretrained(scratch, dtype=torch.bfloat16), name, directory)


def _oneshot(model: LlamaForCausalLM, name: str, directory: Path) -> None:
    modifier, group, more = MADE[name]
    texts = np.random.default_rng(SEED).integers(3, VOCAB, (NUM_SAMPLES, SAMPLE_LENGTH)).tolist()
    data = Dataset.from_list([{"input_ids": text, "attention_mask": [1] * len(text)} for text in texts])
    recipe = modifier(config_groups={"group_0": group}, ignore=["lm_head"], **more)
    oneshot(
        model=model,
        processor=_tokenizer(),
        dataset=data,
        recipe=recipe,
        num_calibration_samples=NUM_SAMPLES,
        max_seq_length=SAMPLE_LENGTH,
    )
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, save_compressed=True)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(Path(scratch) / file, directory / file)


def _modules(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """module -> tensors by their own names, of those that are quantized."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if f"{module}.weight_scale" in tensors:
            found.setdefault(module, {})[last] = tensor
    return found


def _values(tensors: dict[str, torch.Tensor], scheme: QuantizationScheme, layout: str) -> torch.Tensor:
    """float32[out, in]."""
    floats = (torch.bfloat16, torch.float16)
    if layout == "nvfp4-pack-quantized":  # decompressing rounds to bfloat16: the same steps without that
        packed = tensors["weight_packed"]
        numbers = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], torch.float32)
        scale, whole = tensors["weight_scale"].float(), tensors["weight_global_scale"]
        return dequantize(numbers, scale, args=scheme.weights, global_scale=whole, dtype=torch.float32)
    wide = {name: each.float() if each.dtype in floats else each for name, each in tensors.items()}
    state = BaseCompressor.get_value_from_registry(layout).decompress(wide, scheme)
    return state["weight"].float()


def _rounding(scheme: QuantizationScheme, tensors: dict[str, torch.Tensor]) -> Callable[..., Any]:
    """A hook that rounds the inputs of a module as its scheme says."""
    args = scheme.input_activations
    measured = [tensors[name].float() if name in tensors else None for name in ("input_scale", "input_zero_point")]

    def hook(module: Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *others = inputs
        if args.dynamic and args.type == "int":
            groups = x.unflatten(-1, (-1, scheme.weights.group_size or x.shape[-1]))
            scale = groups.abs().amax(-1, keepdim=True) / 127
            return ((torch.round(groups / scale) * scale).reshape(x.shape), *others)
        scale, zero = compute_dynamic_scales_and_zp(x, args, module) if args.dynamic else measured
        return (fake_quantize(x, scale, zero, args), *others)

    return hook


@torch.no_grad()
def _golden(directory: Path) -> dict[str, np.ndarray]:
    raw = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(raw)
    tensors = load_file(directory / "model.safetensors")
    (scheme,) = config.config_groups.values()
    modules = _modules(tensors)
    values = {name: _values(stored, scheme, scheme.format or config.format) for name, stored in modules.items()}
    plain = {
        name: tensor.float()
        for name, tensor in tensors.items()
        if name.rpartition(".")[0] not in modules and not name.endswith(("k_scale", "v_scale"))
    }
    model = LlamaForCausalLM(_config()).eval()
    model.load_state_dict(plain | {f"{module}.weight": value for module, value in values.items()})
    prompt = np.random.default_rng(SEED).integers(3, VOCAB, 40)
    made = {"prompt": prompt.astype(np.int32), "logits": model(torch.from_numpy(prompt)[None]).logits[0].numpy()}
    if scheme.input_activations is not None:
        for name, module in model.named_modules():
            if name in modules:
                module.register_forward_pre_hook(_rounding(scheme, modules[name]))
        made["quantized_logits"] = model(torch.from_numpy(prompt)[None]).logits[0].numpy()
    return made | {module: values[module].numpy() for module in SHOWN}


def _make(name: str) -> None:
    directory = OUT / f"llmcompressor-{name}"
    _quantize(name, directory)
    np.savez_compressed(directory / "golden.npz", **_golden(directory))
    packages = ("llmcompressor", "compressed-tensors", "torch", "transformers", "safetensors", "numpy")
    modifier, group, more = MADE[name]
    provenance = {
        "made_by": "tests/golden/making/compressed.py",
        "seed": SEED,
        "versions": {package: version(package) for package in packages},
        "modifier": modifier.__name__,
        "options": {"config_groups": {"group_0": group}, **more},
    }
    (directory / "golden.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    for each in sys.argv[1:] or MADE:
        _make(each)
