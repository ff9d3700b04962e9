"""AutoRound checkpoints: every layout and its old names, rules for single modules, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import UnsupportedModelError, WeightsError
from models.layers.product import MixedWeight
from models.loading.load import load_model
from models.quantization.auto_round import delegated
from pallas_kernels.quantized_matmul import QuantizedWeight
from tests.quantization.packing import Quantize, require_values, write_quantized
from tests.quantization.test_awq import awq_tensors
from tests.quantization.test_fp8 import in_blocks, per_tensor
from tests.quantization.test_gptq import Written, gptq_tensors

# packing_format -> version of GPTQ's zero points
GPTQ_LAYOUTS = {
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
    "auto_round:gptq:exllamav2": 1,
    "auto_round": 2,
    "auto_round:exllamav2": 2,
    "auto_round:tritonv2": 2,
}


def config_of(**changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "data_type": "int",
        "act_bits": 16,
        "iters": 200,
        "autoround_version": "0.16.1",
        "block_name_to_quantize": "model.layers",
        **changes,
    }


def written_as(rules: dict[str, Written | None], default: Written) -> Quantize:
    """Modules by the first rule whose key their name holds; no g_idx, as AutoRound leaves it out."""

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        found = next((rule for part, rule in rules.items() if part in module), default)
        return None if found is None else gptq_tensors(found, shape, rng)

    return quantize


def everything(bits: int = 4, group_size: int = 32, version: int = 1, sym: bool = False) -> Quantize:
    return written_as({"lm_head": None}, Written(bits, group_size, sym=sym, version=version, with_g_idx=False))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (5, 6, 7)), 8])
def test_bits(bits: int, version: int, tmp_path: Path) -> None:
    layout = "auto_round:auto_gptq" if version == 1 else "auto_round"
    values = write_quantized(tmp_path, config_of(bits=bits, packing_format=layout), everything(bits, version=version))
    loaded = load_model(tmp_path)
    require_values(loaded.params, values)
    assert loaded.quantization is not None and loaded.quantization.startswith("auto-round (w")


@pytest.mark.parametrize("layout", GPTQ_LAYOUTS)
def test_layouts_of_gptq(layout: str, tmp_path: Path) -> None:
    config = config_of(packing_format=layout, quant_method="intel/auto-round")
    values = write_quantized(tmp_path, config, everything(version=GPTQ_LAYOUTS[layout]))
    require_values(load_model(tmp_path).params, values)


@pytest.mark.parametrize(("backend", "version"), [("auto_round:gptq:exllamav2", 1), ("autoround:exllamav2", 2)])
def test_layouts_in_the_words_of_the_first_releases(backend: str, version: int, tmp_path: Path) -> None:
    config = config_of(packing_format=None, backend=backend, quant_method="intel/auto-round")
    values = write_quantized(tmp_path, config, everything(version=version))
    require_values(load_model(tmp_path).params, values)


def test_symmetric_with_negative_scales(tmp_path: Path) -> None:
    values = write_quantized(tmp_path, config_of(sym=True), everything(sym=True))
    params = load_model(tmp_path).params
    require_values(params, values)
    weight = params["layers.0.mlp.down.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.zero_points is None
    assert bool((weight.scales < 0).any())


@pytest.mark.parametrize("layout", ["auto_round:auto_awq", "auto_round:awq"])
def test_layout_of_awq(layout: str, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.v_proj": {"bits": 16}, ".*mlp.*": {"group_size": 16}}

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        if module in ("lm_head", "model.layers.0.self_attn.v_proj"):
            return None
        return awq_tensors(shape, rng, 16 if "mlp" in module else 32)

    values = write_quantized(tmp_path, config_of(packing_format=layout, extra_config=extra), quantize)
    params = load_model(tmp_path).params
    require_values(params, values)
    down = params["layers.1.mlp.down.weight"]
    assert isinstance(down, QuantizedWeight) and down.group_size == 16


def test_rules_of_modules(tmp_path: Path) -> None:
    """A full name comes before the last parts of one, and those before patterns; what a rule leaves out is global."""
    plain = Written(with_g_idx=False)
    rules: dict[str, Written | None] = {
        "layers.0.self_attn.q_proj": Written(8, with_g_idx=False),
        "layers.1.self_attn.q_proj": Written(3, with_g_idx=False),
        "layers.1.self_attn.k_proj": None,
        "layers.0.mlp": Written(2, 16, with_g_idx=False),
        "lm_head": Written(8, with_g_idx=False),
    }
    extra = {
        r".*q_proj.*": {"bits": 2},
        "self_attn.q_proj": {"bits": 3},
        "model.layers.0.self_attn.q_proj": {"bits": 8},
        r"layers\.1\..*k_proj$": {"bits": 16, "data_type": "fp", "act_bits": 16},
        r"^model\.layers\.0\.mlp\.": {"bits": 2, "group_size": 16},
        "lm_head": {"bits": 8},
    }
    values = write_quantized(tmp_path, config_of(extra_config=extra), written_as(rules, plain))
    params = load_model(tmp_path).params
    require_values(params, values)
    first, second = params["layers.0.attn.qkv.weight"], params["layers.1.attn.qkv.weight"]
    assert isinstance(first, MixedWeight) and isinstance(second, MixedWeight)
    assert [getattr(part, "bits", None) for part in first.parts] == [8, 4, 4]
    assert [getattr(part, "bits", None) for part in second.parts] == [4, None, 4]
    assert isinstance(params["head.weight"], QuantizedWeight)


@pytest.mark.parametrize(
    "blocks",
    [
        {"block_name_to_quantize": "model.layers.0, model.embed"},
        {"block_name_to_quantize": ["model.layers.0"]},
        {"block_name_to_quantize": None, "to_quant_block_names": [["model.layers.0"]]},
    ],
)
def test_blocks(blocks: dict[str, Any], tmp_path: Path) -> None:
    values = write_quantized(
        tmp_path, config_of(**blocks), written_as({"layers.1": None, "lm_head": None}, Written(with_g_idx=False))
    )
    params = load_model(tmp_path).params
    require_values(params, values)
    assert isinstance(params["layers.0.attn.o.weight"], QuantizedWeight)
    assert not isinstance(params["layers.1.attn.o.weight"], QuantizedWeight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "quantization_config.bits is 9"),
        ({"bits": 16}, "quantization_config.bits is 16; it must be an integer from 2 to 8"),
        ({"group_size": [128, 128]}, r"quantization_config.group_size is \[128, 128\]"),
        (
            {"packing_format": "auto_round:mlx"},
            "packing_format is 'auto_round:mlx'; it must be auto_round, auto_round:",
        ),
        ({"packing_format": "auto_round:auto_awq", "bits": 8}, "bits is 8; it must be 4 with packing_format"),
        (
            {"packing_format": "auto_round:auto_awq", "extra_config": {"q_proj": {"bits": 8}}},
            "bits is 8; it must be 4 with packing_format",
        ),
        ({"act_bits": 8}, "act_bits is 8; it must be 16"),
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp'; it must be int"),
        ({"super_bits": 6}, "super_bits is 6"),
        ({"rotation_config": {"block_size": 32}}, "rotation_config is .*; it must be absent"),
        ({"extra_config": {"(": {"bits": 8}}}, "invalid pattern"),
        ({"extra_config": {"q_proj": {"act_bits": 8}}}, r"extra_config\['q_proj'\].act_bits is 8"),
        ({"extra_config": {"q_proj": 8}}, r"extra_config\['q_proj'\] is 8; it must be an object"),
        ({"block_name_to_quantize": 3}, "block_name_to_quantize is 3; it must be names of blocks"),
        ({"sym": "full"}, "sym is 'full'; it must be true or false"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, config_of() | changes, everything())
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, r"misshapen.*self_attn.q_proj.qweight is \[8, 64\], expected \[16, 64\]"),
        ({"extra_config": {"q_proj": {"bits": 16}}}, "q_proj.weight is missing.*q_proj.qweight.* is not expected"),
        ({"block_name_to_quantize": "model.layers.1"}, r"layers.0.*.weight is missing"),
    ],
)
def test_tensors_that_contradict_the_config(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, config_of() | changes, everything())
    with pytest.raises(WeightsError, match=message):
        load_model(tmp_path)


FP8 = {"packing_format": "auto_round:fp8", "bits": 8, "data_type": "fp", "act_bits": 8, "group_size": [128, 128]}
MXFP4 = {"packing_format": "auto_round:llm_compressor", "data_type": "mx_fp", "act_bits": 16}


@pytest.mark.parametrize(
    ("changes", "quantize"),
    [
        (FP8 | {"group_size": [32, 32]}, in_blocks((32, 32))),
        (
            FP8 | {"packing_format": "auto_round:fp8_static", "group_size": 0, "act_dynamic": False},
            per_tensor(static=True),
        ),
    ],
)
def test_floats_are_loaded(changes: dict[str, Any], quantize: Quantize, tmp_path: Path) -> None:
    values = write_quantized(tmp_path, config_of() | changes, quantize)
    params = load_model(tmp_path).params
    require_values(params, values)
    weight = params["layers.0.attn.qkv.weight"]
    assert isinstance(weight, QuantizedWeight)
    assert (weight.kind, weight.static is not None) == ("w8a8_fp8", "act_dynamic" in changes)


def test_floats_are_told_in_the_words_of_fp8() -> None:
    found, method = delegated(config_of(**FP8, extra_config={"lm_head": {"bits": 16}}), "auto-round")
    assert method == "fp8"
    assert found == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
        "weight_block_size": [128, 128],
    }


def test_floats_of_4_bits_are_told_in_the_words_of_compressed_tensors() -> None:
    found, method = delegated(config_of(**MXFP4), "auto-round")
    assert method == found["quant_method"] == "compressed-tensors"
    group = found["config_groups"]["group_0"]
    assert (found["format"], group["weights"]["strategy"], group["weights"]["group_size"]) == (
        "mxfp4-pack-quantized",
        "group",
        32,
    )
    assert group["input_activations"] is None
    found, _ = delegated(config_of(**MXFP4 | {"data_type": "nv_fp", "act_bits": 4, "group_size": 16}), "auto-round")
    assert found["config_groups"]["group_0"]["input_activations"]["num_bits"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (FP8 | {"act_bits": 16}, "act_bits is 16; it must be 8 with 8-bit floats"),
        (FP8 | {"group_size": 64}, "group_size is 64; it must be two sizes of a block"),
        (FP8 | {"extra_config": {"q_proj": {"bits": 4}}}, "extra_config is .*names of modules of 16 bits"),
        (MXFP4 | {"bits": 3}, "data_type is 'mx_fp of 3 bits'"),
    ],
)
def test_what_other_methods_have_no_word_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        delegated(config_of(**changes), "auto-round")
