"""Writes tests/golden/quantized/gptqmodel-act-order: the tiny model of `auto_round.py`, quantized by GPTQModel itself.

4 bits, groups of 32 in activation order, zero points. Random tokens calibrate it: what matters is that inputs lie in no
order. `golden.npz` is as `auto_round.py` writes it, with the values of GPTQModel's `dequantize_weight`.

Environment: that of `auto_round.py`, and (GPTQModel compiles its packing, which needs a C++ compiler):

    golden-env/bin/pip install --no-deps --no-build-isolation gptqmodel==7.7.0
    golden-env/bin/pip install pypcre device-smi logbar defuser tokenicer threadpoolctl torchao pillow protobuf requests

Usage from tests/golden:

    CUDA_VISIBLE_DEVICES= golden-env/bin/python -m making.gptq
"""

import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

os.cpu_count = lambda: 16  # GPTQModel refuses to start with a worker for each of few cores

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from .auto_round import GROUP_SIZE, OUT, SEED, SHOWN, VOCAB, _config, _model, _tokenizer  # noqa: E402

DIRECTORY = OUT / "gptqmodel-act-order"
OPTIONS = {"bits": 4, "group_size": GROUP_SIZE, "desc_act": True, "sym": False, "act_group_aware": False}


def _quantize(scratch: Path) -> None:
    _model().save_pretrained(scratch / "plain")
    _tokenizer().save_pretrained(scratch / "plain")
    model = GPTQModel.load(str(scratch / "plain"), QuantizeConfig(**OPTIONS, device="cpu"))
    texts = np.random.default_rng(SEED).integers(3, VOCAB, (32, 64)).tolist()
    model.quantize([{"input_ids": text, "attention_mask": [1] * len(text)} for text in texts], batch_size=1)
    model.save(str(scratch / "made"))
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    DIRECTORY.mkdir(parents=True)
    shutil.copy(scratch / "made" / "model.safetensors", DIRECTORY)
    config = json.loads((scratch / "made" / "config.json").read_text())
    config["quantization_config"]["meta"].pop("offload_to_disk_path", None)  # another one each time
    (DIRECTORY / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def _golden(made: Path) -> dict[str, np.ndarray]:
    loaded = GPTQModel.load(str(made), backend=BACKEND.TORCH, device="cpu").model
    tensors, values = load_file(made / "model.safetensors"), {}
    for name, module in loaded.named_modules():
        if hasattr(module, "qweight"):
            module.scales = tensors[f"{name}.scales"].float()  # loading may have rounded them to bfloat16
            values[name] = module.dequantize_weight().T.float().contiguous()
    plain = {name: t.float() for name, t in tensors.items() if name.rpartition(".")[0] not in values}
    model = LlamaForCausalLM(_config()).eval()
    model.load_state_dict(plain | {f"{name}.weight": value for name, value in values.items()})
    prompt = np.random.default_rng(SEED).integers(3, VOCAB, 40)
    logits = model(torch.from_numpy(prompt)[None]).logits[0]
    shown = {name: values[name].numpy() for name in SHOWN}
    return {"prompt": prompt.astype(np.int32), "logits": logits.numpy(), **shown}


def main() -> None:
    """Write the directory."""
    with tempfile.TemporaryDirectory() as scratch:
        _quantize(Path(scratch))
        np.savez_compressed(DIRECTORY / "golden.npz", **_golden(Path(scratch) / "made"))
    packages = ("gptqmodel", "torch", "transformers", "safetensors", "numpy")
    provenance = {
        "made_by": "tests/golden/making/gptq.py",
        "seed": SEED,
        "versions": {package: version(package) for package in packages},
        "options": OPTIONS,
    }
    (DIRECTORY / "golden.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()
