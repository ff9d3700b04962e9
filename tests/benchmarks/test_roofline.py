"""Costs against counts made by hand, floors against their formulas."""

from __future__ import annotations

import pytest

from benchmarks.ceilings import Ceilings, fastest
from benchmarks.roofline import ModelCosts, compute_floor_s, decode_floor_s, describe_ceilings, workload_flops
from benchmarks.workloads.cpu_smollm2 import WORKLOADS
from models.config import LayerConfig, ModelConfig, RopeConfig

SMOLLM2 = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope=RopeConfig(100000.0, 64),
    layers=(LayerConfig(),) * 30,
    tie_word_embeddings=True,
)
COSTS = ModelCosts.of(SMOLLM2, "bfloat16")
CEILINGS = Ceilings({"a": 20e9, "b": 30e9}, {"x bfloat16": 300e9, "y bfloat16": 200e9, "x float32": 999e9})


def test_weights_are_the_models_parameters_without_norms() -> None:
    norms = (2 * 30 + 1) * 576
    assert COSTS.body_weights + COSTS.head_weights + norms == 134_515_008  # of the model card's 135M


def test_a_decode_step_reads_all_weights_and_the_context() -> None:
    kv_of_a_token = 2 * 3 * 64 * 30 * 2
    assert COSTS.decode_bytes(0) == 2 * (106_168_320 + 28_311_552)
    assert COSTS.decode_bytes(100) - COSTS.decode_bytes(0) == 100 * kv_of_a_token


def test_float32_reads_twice_as_much() -> None:
    assert ModelCosts.of(SMOLLM2, "float32").decode_bytes(50) == 2 * COSTS.decode_bytes(50)


def test_flops_of_a_sequence_by_hand() -> None:
    small = ModelCosts(
        body_weights=10, head_weights=7, kv_elements_per_token=0, attention_flops_per_pair=100, item_bytes=2
    )
    # Three prompt tokens and two outputs: four tokens pass the layers, two need the head; 1 + 2 + 3 + 4 pairs.
    assert small.sequence_flops(3, 2) == 2 * 10 * 4 + 2 * 7 * 2 + 100 * 10


def test_w2_needs_six_teraflop_besides_attention() -> None:
    without_attention = ModelCosts(COSTS.body_weights, COSTS.head_weights, 0, 0, 2)
    assert workload_flops(without_attention, WORKLOADS["w2"]) == pytest.approx(6.1e12, rel=0.01)
    assert workload_flops(COSTS, WORKLOADS["w2"]) == pytest.approx(6.55e12, rel=0.01)


def test_floors_use_the_best_ceiling_of_the_dtype() -> None:
    context = 128 + 129 / 2
    assert decode_floor_s(COSTS, WORKLOADS["w1"], CEILINGS) == pytest.approx(COSTS.decode_bytes(context) / 30e9)
    expected = workload_flops(COSTS, WORKLOADS["w3"]) / 300e9
    assert compute_floor_s(COSTS, WORKLOADS["w3"], CEILINGS, "bfloat16") == pytest.approx(expected)


def test_no_ceiling_no_floor() -> None:
    assert decode_floor_s(COSTS, WORKLOADS["w1"], Ceilings()) is None
    assert compute_floor_s(COSTS, WORKLOADS["w2"], CEILINGS, "float16") is None


def test_merged_ceilings_keep_the_better_of_each_method() -> None:
    merged = CEILINGS.merged(Ceilings({"a": 25e9, "c": 1e9}, {"x bfloat16": 100e9}))
    assert merged.read_bytes_per_s == {"a": 25e9, "b": 30e9, "c": 1e9}
    assert merged.flops_per_s["x bfloat16"] == 300e9
    assert Ceilings(**merged.as_json()) == merged


def test_ceilings_are_described_with_units() -> None:
    lines = describe_ceilings(CEILINGS)
    assert "memory read, b: 30.0 GB/s" in lines and "GEMM, x bfloat16: 300 GFLOP/s" in lines


def test_fastest_is_the_minimum_without_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr("benchmarks.ceilings.time.perf_counter", lambda: next(moments))
    calls: list[int] = []
    assert fastest(lambda: calls.append(1), tries=3) == 2.0
    assert len(calls) == 4
