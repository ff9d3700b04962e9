"""`quire plan` says what an engine finds when it is built: to the byte where it claims so, else within a tolerance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.models import model_config
from engine.builder import load_weights, make_program
from engine.config import EngineConfig
from engine.errors import ConfigError, OutOfMemoryError
from engine.planning.devices import DEVICES, device_of
from engine.planning.estimates import StepCosts, decode_floor, prefill_floor, work_space
from engine.planning.plan import make_plan
from engine.planning.report import COMPILED, ESTIMATED
from engine.runtime.buckets import Bucket
from models.errors import UnsupportedModelError
from tests.engine.helpers import SMALL, TINY

MIB = 1 << 20
SETTINGS = {**SMALL, "num_gpu_blocks_override": None, "kv_cache_memory_bytes": 1 << 20}


def nothing(done: int, total: int, what: str) -> None: ...


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3", {"dtype": "bfloat16", "kv_cache_dtype": "int8"}),
        pytest.param("llama", {}, marks=pytest.mark.slow),
        pytest.param("llama", {"quantization": "int8"}, marks=pytest.mark.slow),
        pytest.param("llama", {"quantization": "fp8", "kv_cache_dtype": "fp8"}, marks=pytest.mark.slow),
        pytest.param("llama", {"quantization": "int4", "dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_a_plan_is_what_the_engine_finds(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    config = EngineConfig.from_flat(model=str(TINY / name), **{**SETTINGS, **settings})
    plan = make_plan(config)
    loaded = load_weights(config.load, TINY / name, nothing)
    ledger, program = make_program(config, loaded, tmp_path)
    assert (plan.weights, plan.state, plan.block) == (ledger.weights, ledger.state, ledger.block)
    assert plan.work_space.size == ledger.temporaries and plan.work_space.how == COMPILED
    assert plan.num_blocks == ledger.num_blocks - 1 and plan.kv == ledger.kv
    assert (plan.max_model_len, plan.kv_cache_dtype) == (program.limits.max_model_len, program.limits.kv_dtype)
    assert {(b.num_tokens, b.num_seqs) for b in plan.buckets} == {
        (b.num_tokens, b.num_seqs) for b in program.buckets.all()
    }


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((TINY / "llama" / "config.json").read_bytes())
    config = EngineConfig.from_flat(model=str(tmp_path), quantization="fp8", max_model_len=64, show_progress=False)
    plan = make_plan(config, "h200", lengths=[16, 64])
    assert plan.work_space.how == ESTIMATED and plan.max_num_seqs == 256  # as on a GPU
    assert plan.limit == int(143771 * MIB * 0.92)
    assert [(each.length, each.running) for each in plan.concurrency] == [(16, 256), (64, 256)]
    assert plan.decode and plan.prefill
    few = replace(config, cache=replace(config.cache, kv_cache_memory_bytes=11 * plan.block))
    found = make_plan(few, "a100", lengths=[16, 64]).concurrency  # 10 blocks of 16 tokens
    assert [(each.by_memory, each.running) for each in found] == [(10, 10), (2, 2)]
    with pytest.raises(OutOfMemoryError, match="max_model_len=64"):
        make_plan(config, "h200", memory=MIB)


def test_what_is_refused(tmp_path: Path) -> None:
    config = EngineConfig.from_flat(model=str(TINY / "llama"), max_model_len=64, show_progress=False)
    with pytest.raises(ConfigError, match="known are h200, h100, a100, cpu"):
        make_plan(config, "tpu")
    with pytest.raises(ConfigError, match="from 1 to max_model_len=64, got 65"):
        make_plan(config, "h200", lengths=[65])
    with pytest.raises(ConfigError, match="memory must be"):
        make_plan(config, "h200", memory=0)
    keep = EngineConfig.from_flat(model=str(TINY / "llama"), quantization="gguf", show_progress=False)
    with pytest.raises(UnsupportedModelError, match="is for GGUF files"):
        make_plan(keep, "h200")


@pytest.mark.parametrize(
    ("model", "compiled_mib"), [("llama-3.1-8b", 386.5), ("qwen3-0.6b", 214.4), ("smollm2-135m", 104.7)]
)
def test_the_estimate_beside_steps_compiled_for_an_h200(model: str, compiled_mib: float) -> None:
    """Temporaries of 2048 tokens of 256 sequences, from docs/measurements/h200-aot.md; outputs are not in them."""
    config, bucket = model_config(model), Bucket(2048, 256)
    outputs = bucket.num_seqs * config.vocab_size * 4 + bucket.num_tokens * config.hidden_size * 2
    assert 0.7 < (work_space(config, "bfloat16", bucket) - outputs) / MIB / compiled_mib < 1.1


def test_floors_of_a_known_model() -> None:
    """Llama-3.1-8B in bfloat16 on an H200, by hand: 7.50 G elements are read in each step, 128 KiB of cache a token."""
    config, device = model_config("llama-3.1-8b"), device_of("h200")
    sizes = {"embed.weight": 128256 * 4096 * 2, "all others": 7_504_924_672 * 2}
    costs = StepCosts.of(config, sizes, "bfloat16", "bfloat16", 131072)
    one = decode_floor(costs, device, 1, 1024, True)
    assert one is not None and one.bound == "weights"
    assert one.seconds == pytest.approx((7_504_924_672 * 2 + 1025 * 131072) / 4.8e12, rel=1e-6)
    many = decode_floor(costs, device, 256, 8192, False)
    assert many is not None and many.bound == "cache" and not many.fits
    prompt = prefill_floor(costs, device, 2048)
    body = 7_504_924_672 - 128256 * 4096 - (2 * 32 + 1) * 4096  # without head and norms
    flops = 2 * 2048 * body + 2 * 128256 * 4096 + 2048 * 2049 / 2 * 4 * 4096 * 32
    assert prompt is not None and prompt.seconds == pytest.approx(flops / 9.89e14, rel=1e-6)
    assert decode_floor(costs, DEVICES["cpu"], 1, 1024, True) is None


def test_every_device_says_where_its_figures_come_from() -> None:
    for key, device in DEVICES.items():
        assert device.key == key and device.source
        assert (device.bytes_per_s is None) == (not device.flops_per_s) == device.on_cpu
