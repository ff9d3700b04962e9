"""Loads what `make.py` wrote with transformers and the formats' own libraries, and writes `results.json`.

For each checkpoint the largest difference of logits to Quire's, in three ways:

- `as_loaded`: `from_pretrained` in float32 on a CPU, as a user would. The kernels there may compute in bfloat16.
- `own_values`: the values of the weights as the format's own library dequantizes them, in a plain float32 model.
- `rounded` (fp8): the same with each input rounded to e4m3 per token, as the config asks for and Quire does;
  transformers leaves inputs as they are without a GPU.

Environment: that of tests/golden/making/gptq.py, and `compressed-tensors==0.20.0 optimum accelerate`. Usage:

    CUDA_VISIBLE_DEVICES= golden-env/bin/python tests/quantizer/round_trip/check.py FOLDER
"""

import datetime
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.cpu_count = lambda: 16  # GPTQModel refuses to start with a worker for each of few cores

import numpy as np  # noqa: E402
import torch  # noqa: E402
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, LlamaForCausalLM  # noqa: E402
from transformers.integrations.finegrained_fp8 import Fp8Dequantize  # noqa: E402

PACKAGES = ("transformers", "torch", "compressed-tensors", "gptqmodel", "optimum", "safetensors", "numpy")
RESULTS = Path(__file__).parent / "results.json"


def _compressed(tensors: dict[str, torch.Tensor], raw: dict[str, Any]) -> torch.Tensor:
    (scheme,) = QuantizationConfig.model_validate(raw).config_groups.values()
    wide = {name: each.float() if each.dtype == torch.bfloat16 else each for name, each in tensors.items()}
    return BaseCompressor.get_value_from_registry(raw["format"]).decompress(wide, scheme)["weight"]


def _fp8(tensors: dict[str, torch.Tensor], raw: dict[str, Any]) -> torch.Tensor:
    return Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], torch.float32)


def _gptq(loaded: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    values = {}
    for name, module in loaded.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = tensors[f"{name}.scales"].float()  # loading may have rounded them
            values[name] = module.dequantize_weight().T.float().contiguous()
    return values


def _awq(tensors: dict[str, torch.Tensor], raw: dict[str, Any]) -> torch.Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(
        tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), raw["bits"], raw["group_size"]
    ).T.float()


def _modules(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """module -> tensors by their own names, of those that are quantized."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if any(f"{module}.{scale}" in tensors for scale in ("scales", "weight_scale", "weight_scale_inv")):
            found.setdefault(module, {})[last] = tensor
    return found


def _rounded(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    x = inputs[0]
    scale = x.abs().amax(-1, keepdim=True) / 448
    return ((x / scale).to(torch.float8_e4m3fn).float() * scale,)


@torch.no_grad()
def _check(directory: Path) -> dict[str, Any]:
    golden = dict(np.load(directory / "logits.npz"))
    windows = torch.from_numpy(golden["windows"]).long()
    raw = json.loads((directory / "config.json").read_text())["quantization_config"]
    method = raw["quant_method"]
    expected = golden.get("unrounded", golden["logits"])
    tensors = load_file(directory / "model.safetensors")
    modules = _modules(tensors)

    def difference(model: torch.nn.Module, other: np.ndarray = expected) -> float:
        return float(np.abs(model(windows).logits.float().numpy() - other).max())

    result: dict[str, Any] = {"largest_logit": float(np.abs(expected).max())}
    loaded, dequantized = None, CompressedTensorsConfig(dequantize=True)
    for key, more in (("as_loaded", {}), ("as_loaded_dequantized", {"quantization_config": dequantized})):
        if key != "as_loaded" and method != "compressed-tensors":
            continue
        try:
            found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **more).eval()
            loaded = loaded or found
            result[key] = difference(found)
        except RuntimeError as error:
            result[key] = f"refused: {str(error)[:120]}"
    if method == "gptq":
        values = _gptq(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), tensors)
    else:
        function = {"compressed-tensors": _compressed, "fp8": _fp8, "awq": _awq}[method]
        values = {name: function(each, raw) for name, each in modules.items()}
    assert values.keys() == modules.keys()
    plain = {name: each.float() for name, each in tensors.items() if name.rpartition(".")[0] not in modules}
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict(plain | {f"{name}.weight": value for name, value in values.items()})
    result["own_values"] = difference(model)
    if "unrounded" in golden:
        for name, module in model.named_modules():
            if name in modules:
                module.register_forward_pre_hook(_rounded)
        result["rounded"] = difference(model, golden["logits"])
        first = np.abs(model(windows).logits.numpy() - golden["logits"])[:, :8].max()
        result["rounded_first_8_tokens"] = float(first)
    return result


def main(folder: Path) -> None:
    """Check every checkpoint in the folder."""
    results = {}
    for directory in sorted(path.parent for path in folder.glob("*/logits.npz")):
        results[directory.name] = _check(directory)
        print(directory.name, results[directory.name], flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "versions": {package: version(package) for package in PACKAGES},
        "differences_of_logits": results,
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
