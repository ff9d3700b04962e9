"""Quantized checkpoints through the whole engine: the tools' logits, packed sizes, one answer for all schedules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engine.sampling_params import SamplingParams
from tests.engine.conftest import EngineShelf, MakeEngine
from tests.engine.helpers import GOLDEN, TINY, VOCAB, parts_of, prompt_logprobs, tokens_of
from tests.engine.test_invariance import ALONE, CASES, Schedule, make_core, run
from tests.quantization import test_auto_round, test_awq, test_fp8, test_gptq
from tests.quantization import test_compressed_tensors as compressed
from tests.quantization.packing import write_quantized
from tests.quantization.test_gptq import Written, gptq_tensors

NAMES = sorted(path.name for tool in ("autoround", "gptqmodel") for path in (GOLDEN / "quantized").glob(f"{tool}-*"))
SETTINGS = {"max_num_batched_tokens": 24, "block_size": 8, "max_logprobs": -1}
SIZES = {"vocab_size": VOCAB, "max_position_embeddings": 512, "num_hidden_layers": 2, "rms_norm_eps": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logprobs_are_those_of_the_tool(name: str, make_engine: MakeEngine) -> None:
    """Checkpoints and values by AutoRound and GPTQModel, logits by transformers, all in float32."""
    directory = GOLDEN / "quantized" / name
    engine = make_engine(str(directory), skip_tokenizer_init=True, max_num_batched_tokens=16)
    with np.load(directory / "golden.npz") as golden:
        prompt, logits = golden["prompt"].tolist(), golden["logits"].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    (output,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    difference = np.abs(prompt_logprobs(output) - expected[np.arange(len(prompt) - 1), prompt[1:]]).max()
    print(f"{name}: {difference:.1e}")
    assert difference < 1e-4


COMPRESSED = sorted(path.name for path in (GOLDEN / "quantized").glob("llmcompressor-*"))
# Activations rounded by scales of their own: one that lies halfway between two numbers goes either way, and so does all
# behind it. The first tokens show that the rounding is the same.
ROUNDED = ("llmcompressor-fp8-block", "llmcompressor-fp8-channel", "llmcompressor-w8a8")
CACHED = "llmcompressor-fp8-kv"  # keys and values are rounded too, which the golden logits leave out


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPRESSED)
def test_logprobs_are_those_of_compressed_tensors(name: str, make_engine: MakeEngine) -> None:
    """By llm-compressor; values and rounding of activations by compressed-tensors, logits by transformers."""
    directory = GOLDEN / "quantized" / name
    engine = make_engine(str(directory), skip_tokenizer_init=True, max_num_batched_tokens=16)
    with np.load(directory / "golden.npz") as golden:
        prompt = golden["prompt"].tolist()
        logits = golden["quantized_logits" if "quantized_logits" in golden else "logits"].astype(np.float64)
    expected = _logprobs(logits, prompt)
    (output,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    difference = np.abs(prompt_logprobs(output) - expected)
    print(f"{name}: {difference.max():.1e}, mean {difference.mean():.1e}")
    if name == CACHED:
        assert difference.mean() < 0.3
    elif name in ROUNDED:
        assert difference[:7].max() < 1e-4 and difference.mean() < 0.08
    else:
        assert difference.max() < 1e-4


def _logprobs(logits: np.ndarray, prompt: list[int]) -> np.ndarray:
    """float64 of all tokens but the first."""
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return expected[np.arange(len(prompt) - 1), prompt[1:]]


def _small(made: tuple[dict[str, np.ndarray], np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same numbers with scales that a model can live with; exact."""
    tensors, values = made
    return tensors | {"scales": tensors["scales"] / np.float16(64)}, values / 64


def _act_order(directory: Path) -> None:
    written = Written(act_order=True)

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        return None if module == "lm_head" else _small(gptq_tensors(written, shape, rng))

    write_quantized(directory, test_gptq.config_of(written), quantize, **SIZES)


def _awq(directory: Path) -> None:
    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        return None if module == "lm_head" else _small(test_awq.awq_tensors(shape, rng))

    write_quantized(directory, test_awq.config_of(), quantize, **SIZES)


def _mixed_bits(directory: Path) -> None:
    """Projections of 8, 2, and 16 bits fused with those of 4."""
    extra = {"q_proj": {"bits": 8}, ".*layers.0.*up_proj": {"bits": 2}, "model.layers.1.self_attn.v_proj": {"bits": 16}}

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        if module in ("lm_head", "model.layers.1.self_attn.v_proj"):
            return None
        bits = 8 if module.endswith("q_proj") else 2 if module.endswith("0.mlp.up_proj") else 4
        tensors, values = _small(gptq_tensors(Written(bits, with_g_idx=False), shape, rng))
        if bits == 8:
            tensors["scales"], values = tensors["scales"] / np.float16(16), values / 16
        return tensors, values

    write_quantized(directory, test_auto_round.config_of(extra_config=extra), quantize, **SIZES)


Made = tuple[dict[str, np.ndarray], np.ndarray] | None


def _finer(made: Made, by: int) -> Made:
    """The same numbers with scales that a model can live with."""
    if made is None:
        return None
    tensors, values = made
    scale = tensors["weight_scale"]
    return tensors | {"weight_scale": (scale.astype(np.float32) / by).astype(scale.dtype)}, values / by


def _w4a16(directory: Path) -> None:
    config = compressed.config_of(
        "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    )
    write_quantized(
        directory, config, lambda *args: _finer(compressed.packed(*args, bits=4, size=32, zeros=True), 64), **SIZES
    )


def _w8a8_static(directory: Path) -> None:
    weights = {"num_bits": 8, "strategy": "channel"}
    config = compressed.config_of("int-quantized", weights, compressed.STATIC | {"symmetric": False})

    def quantize(*args: Any) -> Made:
        return _finer(compressed.integers(*args, static=True, point=-20), 8)

    write_quantized(directory, config, quantize, **SIZES)


def _floats_and_cache(directory: Path) -> None:
    float8 = compressed.FLOAT
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config = compressed.config_of(
        "float-quantized", float8 | {"strategy": "channel"}, compressed.DYNAMIC | float8, kv_cache_scheme=cache
    )
    write_quantized(directory, config, lambda *args: _finer(compressed.floats(*args), 4), **SIZES)


def _fp8_blocks(directory: Path) -> None:
    """Blocks of 128x128, whole in every matrix but those of the keys and values."""

    def quantize(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Made:
        if module == "lm_head":
            return None
        numbers = rng.uniform(-448, 448, shape).astype(ml_dtypes.float8_e4m3fn)
        scales = (rng.uniform(0.5, 1.5, (-(-shape[0] // 128), shape[1] // 128)) / 2048).astype(np.float32)
        wide = np.repeat(np.repeat(scales, 128, 0)[: shape[0]], 128, 1)
        return {"weight": numbers, "weight_scale_inv": scales}, numbers.astype(np.float64) * wide

    wide = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 64}
    write_quantized(directory, test_fp8.config_of((128, 128)), quantize, **(SIZES | wide))


WRITERS: dict[str, Callable[[Path], None]] = {
    "compressed_w4a16": _w4a16,
    "compressed_w8a8_static": _w8a8_static,
    "compressed_fp8_with_cache": _floats_and_cache,
    "fp8_blocks": _fp8_blocks,
    "gptq_act_order": _act_order,
    "awq": _awq,
    "auto_round_mixed": _mixed_bits,
}
FAST_WRITER = "auto_round_mixed"


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == FAST_WRITER else pytest.mark.slow) for name in WRITERS],
)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized checkpoint with the tokenizer of the tiny golden llama."""
    directory = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "llama" / file, directory / file)
    return directory


def test_schedules_change_nothing(checkpoint: Path, shelf: EngineShelf) -> None:
    """Each request alone and whole; then all together in chunks, with prefixes found in the cache, and preempted."""
    greedy = [number for number, case in enumerate(CASES) if case.params.temperature == 0]
    parts = parts_of(shelf.take(str(checkpoint), **SETTINGS))
    alone = [run(make_core(parts, ALONE), parts, [number], [0])[0] for number in greedy]
    texts = {c.token_ids for output in alone for c in output.outputs}
    assert sum(map(len, texts)) > 60 and len({token for text in texts for token in text}) > 20, "nothing to compare"
    core, tight = make_core(parts, Schedule(spare_blocks=1000)), make_core(parts, Schedule(spare_blocks=0))
    for schedule in (core, core, tight, make_core(parts, Schedule(threshold=3))):
        outputs = run(schedule, parts, greedy, [0, 1, *[0] * (len(greedy) - 2)])
        for output, expected in zip(outputs, alone, strict=True):
            assert tokens_of(output) == tokens_of(expected)
    assert tight.scheduler.stats().num_preemptions > 0


@pytest.mark.slow
def test_drafts_change_nothing(tmp_path: Path, make_engine: MakeEngine) -> None:
    """Greedy tokens of packed weights, with zero points, are those of the same engine without speculation."""
    _w4a16(tmp_path)
    settings = SETTINGS | {"skip_tokenizer_init": True}
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "adaptive": False}
    plain = make_engine(str(tmp_path), **settings)
    drafting = make_engine(str(tmp_path), **settings, speculative_config=json.dumps(drafts))
    rng = np.random.default_rng(0)
    prompts = [np.tile(rng.integers(3, VOCAB, size), 4).tolist() for size in (3, 5, 9, 12)]
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    found, expected = (engine.generate(prompts, params) for engine in (drafting, plain))
    assert [tokens_of(output) for output in found] == [tokens_of(output) for output in expected]
    stats = parts_of(drafting).core.stats
    assert stats.num_draft_tokens > 20 and stats.num_accepted_tokens > 5


def test_the_ledger_counts_packed_weights(tmp_path: Path, make_engine: MakeEngine) -> None:
    """AWQ in groups of 32: half a byte a number, two bytes a scale, one a zero point."""
    _awq(tmp_path)
    parts = parts_of(make_engine(str(tmp_path), **SETTINGS, skip_tokenizer_init=True))
    config = parts.model
    model, ffn, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    matrices = ((model, q + 2 * kv), (q, model), (model, 2 * ffn), (ffn, model))
    packed = config.num_layers * sum(k * n // 2 + 3 * (k // 32) * n for k, n in matrices)
    plain = 4 * (2 * VOCAB * model + (2 * config.num_layers + 1) * model)
    assert parts.ledger.weights == packed + plain
