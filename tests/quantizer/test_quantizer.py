"""`quire quantize` below its command: blocks, methods, writers, and jobs that are interrupted."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import WeightsError
from models.loading.load import load_model
from models.loading.safetensors import open_safetensors
from models.quantizer import grid
from models.quantizer.blocks import BlockProblem, BlockRunner, Projection, gram_of
from models.quantizer.evaluate import predict, score
from models.quantizer.job import quantize_model
from models.quantizer.methods import autoround, awq, gptq, rtn
from models.quantizer.types import Settings, SettingsError
from models.quantizer.writers import formats
from tests.models.tiny_checkpoints import GOLDEN, random_tensors, tiny_config, write_checkpoint
from tests.quantization.packing import SIZES, dense


def slow(*values: Any) -> Any:
    """Values of a parameter for `make test-all`: most of the time is that of compiling one more descent or shape."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name", ["qwen2_window", "qwen3", *(slow(name) for name in ("llama", "llama_bias", "mistral", "smollm3"))]
)
def test_blocks_are_those_of_the_decoder(name: str) -> None:
    """The runner's layers one after another give the decoder's hidden states."""
    model = load_model(GOLDEN / name, dtype="float32")
    config, params = model.config, model.params
    windows = np.random.default_rng(0).integers(3, config.vocab_size, (2, 40)).astype(np.int32)
    expected = predict(config, params, windows).hidden
    x = jnp.asarray(np.asarray(params["embed.weight"])[windows])
    for index, layer in enumerate(config.layers):
        prefix = f"layers.{index}."
        weights: Any = {n[len(prefix) :]: w for n, w in params.items() if n.startswith(prefix)}
        x = BlockRunner(config, layer).forward(weights, x)
    norm: Any = params["norm.weight"]
    found = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.rms_norm_eps) * norm
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def problem_of(seed: int = 0, **changes: Any) -> BlockProblem:
    """The first block of a tiny model with correlated activations."""
    config = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 4, **changes}
    raw = tiny_config(**config)
    from_family = write_checkpoint_model(raw)
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((64, 64)) * (1.0 + 4.0 * (np.arange(64) % 7 == 0))
    x = jnp.asarray(rng.standard_normal((6, 24, 64)) @ mixing / 8, jnp.float32)
    weights: Any = {n[len("layers.0.") :]: w for n, w in from_family.params.items() if n.startswith("layers.0.")}
    model = from_family.config
    kv, ffn = model.kv_size, model.intermediate_size
    spans = {
        "q_proj": ("attn.qkv", 0, model.q_size),
        "k_proj": ("attn.qkv", model.q_size, model.q_size + kv),
        "v_proj": ("attn.qkv", model.q_size + kv, model.q_size + 2 * kv),
        "o_proj": ("attn.o", 0, 64),
        "gate_proj": ("mlp.gate_up", 0, ffn),
        "up_proj": ("mlp.gate_up", ffn, 2 * ffn),
        "down_proj": ("mlp.down", 0, 64),
    }
    projections = tuple(Projection(name, *span) for name, span in spans.items())
    return BlockProblem(BlockRunner(model, model.layers[0]), weights, projections, x, x, "float16")


def write_checkpoint_model(raw: dict[str, Any]) -> Any:
    """A model of moderate weights, so that activations stay near 1."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = {
            name: (value * 0.15 if value.ndim == 2 else value * 0.1 + 1).astype(np.float32)
            for name, value in random_tensors(raw).items()
        }
        return load_model(write_checkpoint(Path(folder), raw, tensors))


def block_error(problem: BlockProblem, found: Any, changed: Any) -> float:
    weights = {**problem.weights, **changed}
    for projection in problem.projections:
        name = f"{projection.matrix}.weight"
        values = jnp.asarray(found[projection.module].values()).T
        weights[name] = weights[name].at[:, projection.start : projection.stop].set(values)
    error = problem.runner.forward(weights, problem.x) - problem.runner.forward(problem.weights, problem.x)
    return float(jnp.sqrt(jnp.mean(error**2)))


@pytest.mark.parametrize("sym", [True, slow(False)])
def test_methods_lose_less_than_rounding(sym: bool) -> None:
    problem = problem_of()
    errors = {}
    for name, method in (("rtn", rtn), ("gptq", gptq), ("awq", awq), ("autoround", autoround)):
        settings = Settings(method=name, bits=3, group_size=32, sym=sym, steps=60, batch_size=6)
        errors[name] = block_error(problem, *method.quantize_block(problem, settings))
    assert errors["gptq"] < errors["rtn"]
    assert errors["awq"] < errors["rtn"]
    assert errors["autoround"] < 0.8 * errors["rtn"]


def test_gptq_makes_up_for_errors_where_inputs_correlate() -> None:
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((512, 64)) @ rng.standard_normal((64, 64))
    matrix, gram = (
        jnp.asarray(rng.standard_normal((48, 64)), jnp.float32),
        gram_of(jnp.asarray(inputs[None], jnp.float32)),
    )

    def lost(quantized: Any) -> float:
        error = quantized.values() - np.asarray(matrix)
        return float(np.sqrt(((inputs @ error.T) ** 2).mean()))

    plain = Settings(bits=3, group_size=32)
    ordered = Settings(bits=3, group_size=32, act_order=True)
    rounded = lost(rtn.quantize(matrix, plain, "float16"))
    assert lost(gptq.quantize(matrix, gram, plain, "float16")) < 0.7 * rounded
    found = gptq.quantize(matrix, gram, ordered, "float16")
    floats = Settings(bits=8, format="fp8")
    nearest = rtn.quantize_to_floats(matrix)
    largest = np.abs(np.asarray(matrix)).max()
    assert np.isclose(nearest.scales[0, 0], largest / 448)  # 48 outputs and 64 inputs are one block
    numbers = (np.asarray(matrix) / nearest.scales[0, 0]).clip(-448, 448).astype(jnp.float8_e4m3fn)
    assert np.mean(nearest.numbers == numbers.astype(np.float32)) > 0.999
    assert lost(gptq.quantize_to_floats(matrix, gram, floats)) < 0.7 * lost(nearest)
    assert found.group_of is not None and sorted(np.bincount(found.group_of)) == [32, 32]
    assert lost(found) < 0.7 * rounded


def test_folding_changes_nothing() -> None:
    problem = problem_of()
    folded = awq.fold(problem, Settings(method="awq", group_size=32))
    before = problem.runner.forward(problem.weights, problem.x)
    after = problem.runner.forward(folded, problem.x)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    assert not np.array_equal(folded["attn_norm.weight"], problem.weights["attn_norm.weight"])


@pytest.mark.slow
def test_the_descent_depends_on_its_seed_alone() -> None:
    problem = problem_of()

    def codes(seed: int) -> np.ndarray:
        settings = Settings(method="autoround", bits=2, group_size=32, steps=20, batch_size=2, seed=seed)
        return autoround.quantize_block(problem, settings)[0]["down_proj"].codes

    assert np.array_equal(codes(1), codes(1))
    assert not np.array_equal(codes(1), codes(2))


def test_scales_are_rounded_before_numbers_are() -> None:
    matrix = jnp.asarray(np.random.default_rng(2).standard_normal((8, 64)), jnp.float32)
    found = rtn.quantize(matrix, Settings(group_size=32), "bfloat16")
    assert np.array_equal(found.scales, found.scales.astype(jnp.bfloat16).astype(np.float32))
    nearest = np.abs(found.values() - np.asarray(matrix)) / np.abs(found.scales[:, found.groups])
    assert nearest.max() <= 1.01  # half a step, and a whole one at the end that is cut off
    low, high = jnp.zeros((1, 1)), jnp.zeros((1, 1))
    assert float(grid.choose(low, high, bits=4, sym=True, dtype="float16")[0][0, 0]) > 0


FORMATS = [
    slow("gptq", {"method": "rtn", "bits": 2}),
    ("gptq", {"method": "rtn", "bits": 3, "sym": False}),
    ("gptq", {"method": "gptq", "bits": 4, "act_order": True, "sym": False}),
    slow("gptq", {"method": "autoround", "steps": 5, "bits": 4}),
    slow("gptq", {"method": "rtn", "bits": 8, "group_size": -1}),
    slow("awq", {"method": "awq", "sym": False}),
    ("awq", {"method": "rtn", "sym": False}),
    ("compressed-tensors", {"method": "rtn", "bits": 4, "sym": False}),
    slow("compressed-tensors", {"method": "gptq", "bits": 8, "act_order": True}),
    ("fp8", {"method": "rtn", "bits": 8}),
    ("fp8", {"method": "gptq", "bits": 8}),
]


@pytest.mark.parametrize(("layout", "changes"), FORMATS)
def test_what_is_written_is_what_is_read(
    layout: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loaders of `models.quantization`, which have tests of their own, find the values that the method meant."""
    made: dict[str, np.ndarray] = {}
    for name, writer in formats.WRITERS.items():

        def keep(module: str, matrix: Any, dtype: Any, writer: Any = writer) -> Any:
            made[module] = matrix.values()
            return writer(module, matrix, dtype)

        monkeypatch.setitem(formats.WRITERS, name, keep)  # type: ignore[arg-type]
    raw = tiny_config(**SIZES)
    source = write_checkpoint(tmp_path / "source", raw, random_tensors(raw))
    windows = np.random.default_rng(3).integers(3, 40, (4, 16)).astype(np.int32)
    settings = Settings(format=layout, **{"group_size": 32, **changes})
    reports = quantize_model(source, tmp_path / "out", settings, windows)
    assert [report.layer for report in reports] == [0, 1]
    loaded = load_model(tmp_path / "out", dtype="float32")
    assert loaded.quantization is not None
    for layer in range(2):
        found = dense(loaded.params[f"layers.{layer}.mlp.down.weight"]).T
        module = f"model.layers.{layer}.mlp.down_proj"
        np.testing.assert_array_equal(found, made[module].astype(np.float32))
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupted_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tiny_config(**SIZES)
    source = write_checkpoint(tmp_path / "source", raw, random_tensors(raw))
    windows = np.random.default_rng(3).integers(3, 40, (4, 16)).astype(np.int32)
    settings = Settings(method="gptq", group_size=32)
    whole = quantize_model(source, tmp_path / "whole", settings, windows)

    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, tmp_path / "out", settings, windows, stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SettingsError, match="unfinished job with other settings"):
        quantize_model(source, tmp_path / "out", Settings(method="rtn", group_size=32), windows)
    seen: list[int] = []
    again = quantize_model(source, tmp_path / "out", settings, windows, lambda done, total, what: seen.append(done))
    assert seen == [2]
    assert again == whole
    first, second = (open_safetensors(tmp_path / name) for name in ("whole", "out"))
    assert set(first.names()) == set(second.names())
    assert all(np.array_equal(first.read(name), second.read(name)) for name in first.names())


@pytest.mark.slow
def test_perplexity_of_what_is_written(tmp_path: Path) -> None:
    """8 bits change next to nothing."""
    source = GOLDEN / "llama"
    plain = load_model(source, dtype="float32")
    windows = np.random.default_rng(4).integers(3, plain.config.vocab_size, (4, 32)).astype(np.int32)
    quantize_model(source, tmp_path / "out", Settings(method="rtn", bits=8, group_size=32), windows)
    made = load_model(tmp_path / "out", dtype="float32")
    scores = score(predict(made.config, made.params, windows), windows, predict(plain.config, plain.params, windows))
    assert scores.mean_kl is not None and scores.mean_kl < 0.02
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "hqq"}, "method must be one of rtn, gptq, awq, autoround"),
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8"),
        ({"group_size": 48}, "group_size must be -1, 32, 64 or 128"),
        ({"format": "marlin"}, "format must be one of gptq, awq"),
        ({"format": "awq", "bits": 8}, "format awq has 4 bits"),
        ({"format": "fp8"}, "format fp8 is 8-bit floats"),
        ({"format": "fp8", "method": "awq", "bits": 8}, "method rtn or gptq"),
        ({"method": "rtn", "act_order": True}, "act_order is GPTQ's"),
        ({"method": "awq", "awq_scales": True}, "awq_scales go before autoround"),
        ({"damp": 0.0}, "damp must be between"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings(**changes)


def test_refusals(tmp_path: Path) -> None:
    raw = tiny_config(**SIZES)
    source = write_checkpoint(tmp_path / "source", raw, random_tensors(raw))
    windows = np.zeros((1, 16), np.int32)
    with pytest.raises(SettingsError, match="group_size=128 does not divide the 64 inputs.*64, 32, -1 would"):
        quantize_model(source, tmp_path / "out", Settings(), windows)
    (tmp_path / "there").mkdir()
    with pytest.raises(WeightsError, match="exists already"):
        quantize_model(source, tmp_path / "there", Settings(), windows)
    quantize_model(source, tmp_path / "out", Settings(method="rtn", group_size=32), windows)
    with pytest.raises(SettingsError, match=r"quantized already \(gptq\)"):
        quantize_model(tmp_path / "out", tmp_path / "twice", Settings(), windows)
